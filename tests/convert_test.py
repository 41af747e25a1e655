"""Weights out of one format into another: nothing lost, nothing changed, nothing left behind when it cannot be done."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conversion_test import SMALL, arrays_of, equal, head_arrays

from configs import quickstart
from raddino_jax import checkpoints, convert, encoders, train
from raddino_jax import params as trees
from raddino_jax.conversion import files, formats
from raddino_jax.conversion.rules import WeightsError
from raddino_jax.data import images
from raddino_jax.models.vit import ViT

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*heads of 64")  # right here, but no released width


def hub(folder: Path, network: ViT, dtype=np.float32, heads=()) -> Path:
    """A folder as the RAD-DINO release lays it out: the backbone in the names of the hub, heads beside it."""
    folder.mkdir()
    files.write(
        folder / "backbone_compatible.safetensors", formats.write("dinov2", arrays_of(network, dtype), "test")
    )
    for name in heads:
        files.write(folder / f"{name}.safetensors", formats.write("dino_head", head_arrays(), "test"))
    return folder


def contents(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a folder's safetensors files, by file and name."""
    return {f"{p.name}/{name}": v for p in folder.glob("*.safetensors") for name, v in files.read(p).items()}


NETWORKS = {
    "plain": ViT(**SMALL | dict(heads=1)),
    "registers": ViT(**SMALL | dict(heads=1), registers=4),
    "swiglu": ViT(**SMALL | dict(heads=1), ffn="swiglu"),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("network", NETWORKS)
def test_round_trips(tmp_path, network, dtype):
    """hub -> ours -> hf -> ours -> hub: bit for bit the same in every format, heads included."""
    start = hub(tmp_path / "hub", NETWORKS[network], dtype, formats.HEADS)
    original = encoders.open_source(str(start), with_heads=True)
    previous = start
    for step, to in enumerate(["orbax", "hf", "orbax", "torch", "hf", "torch"]):
        report = convert.convert(str(previous), tmp_path / f"{step}-{to}", to)
        assert convert.checksum(original.modules) in report and "193" not in report[:3]
        previous = tmp_path / f"{step}-{to}"
        found = encoders.open_source(str(previous), with_heads=True)
        assert found.modules.keys() == original.modules.keys()
        for module, arrays in original.modules.items():
            equal(found.modules[module], arrays)
        assert found.preprocess == original.preprocess
        assert found.fields | dict(offset=0) == original.fields | dict(offset=0)
    equal(contents(previous), contents(start))
    equal(contents(tmp_path / "4-hf"), contents(tmp_path / "1-hf"))


def test_others_may_read_what_is_written(tmp_path):
    """Weights have the permissions of any other new file."""
    convert.convert(str(hub(tmp_path / "hub", NETWORKS["plain"], heads=["dino_head"])), tmp_path / "hf", "hf")
    (tmp_path / "hf" / "mine").touch()
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1


def test_training_checkpoints_and_single_files(tmp_path):
    """A teacher checkpoint of DINOv2, chunked, with optimiser and all, becomes a workdir that training continues."""
    torch = pytest.importorskip("torch")
    backbone = formats.write("dinov2", arrays_of(NETWORKS["plain"]), "test")
    head = formats.write("dino_head", head_arrays(), "test")
    teacher = {
        f"backbone.{n.replace('blocks.', 'blocks.0.', 1)}": torch.from_numpy(v) for n, v in backbone.items()
    }
    teacher |= {f"dino_head.{n}": torch.from_numpy(v) for n, v in head.items()}
    torch.save({"teacher": teacher, "iteration": 7}, tmp_path / "teacher_checkpoint.pth")
    convert.convert(str(tmp_path / "teacher_checkpoint.pth"), tmp_path / "run", "orbax")
    modules, lines = encoders.load_modules(str(tmp_path / "run"))
    equal(trees.flatten(modules["backbone"]), arrays_of(NETWORKS["plain"]))
    equal(trees.flatten(modules["dino_head"]), head_arrays())
    assert modules["ibot_head"] is None
    assert any("dino_head" in line and "step 0" in line for line in lines)
    same, _ = encoders.load_modules(str(tmp_path / "run" / "checkpoints" / "0"))
    equal(trees.flatten(same), trees.flatten(modules)) if same["ibot_head"] else equal(
        trees.flatten(same["backbone"]), trees.flatten(modules["backbone"])
    )


def test_heads_on_their_own_and_backbones_without(tmp_path):
    folder = hub(tmp_path / "hub", NETWORKS["plain"], heads=["dino_head"])
    modules, _ = encoders.load_modules(str(folder))
    assert modules["backbone"] and modules["dino_head"] and modules["ibot_head"] is None
    modules, _ = encoders.load_modules(str(folder / "backbone_compatible.safetensors"))
    assert modules["backbone"] and modules["dino_head"] is None
    modules, _ = encoders.load_modules(str(folder / "dino_head.safetensors"))
    equal(trees.flatten(modules["dino_head"]), head_arrays())
    assert modules["backbone"] is None


def test_an_untrained_mask_token_is_said(tmp_path):
    arrays = arrays_of(NETWORKS["plain"]) | {"mask_token": np.zeros((1, 64), np.float32)}
    files.write(tmp_path / "x.safetensors", formats.write("dinov2", arrays, "test"))
    assert any(
        "mask token is zero" in line for line in encoders.load_modules(str(tmp_path / "x.safetensors"))[1]
    )


def test_what_a_format_insists_on_is_added(tmp_path):
    """transformers always has LayerScale and a mask token: ones and zeros change nothing."""
    network = ViT(**SMALL | dict(heads=1, layerscale=0.0), mask_token=False)
    report = convert.convert(str(hub(tmp_path / "hub", network)), tmp_path / "hf", "hf")
    assert "LayerScale of ones" in report and "mask token of zeros" in report
    film = [np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)]
    before, after = (encoders.load(str(tmp_path / name)) for name in ("hub", "hf"))
    np.testing.assert_array_equal(*(e(e.preprocess(film))["patches"] for e in (before, after)))


# --- what cannot be done ------------------------------------------------------------------------------------


def test_never_overwrites(tmp_path):
    source = str(hub(tmp_path / "hub", NETWORKS["plain"]))
    (tmp_path / "there").mkdir()
    convert.convert(source, tmp_path / "there", "hf")  # an empty folder is as good as none
    before = contents(tmp_path / "there")
    with pytest.raises(WeightsError, match="is there already"):
        convert.convert(source, tmp_path / "there", "torch")
    equal(contents(tmp_path / "there"), before)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WeightsError, match="is there already"):
        convert.convert(source, tmp_path / "file", "hf")
    with pytest.raises(WeightsError, match="expected the name of a folder"):
        convert.convert(source, tmp_path / "mine.pth", "torch")


def without(*names: str):
    return lambda arrays: {n: v for n, v in arrays.items() if n not in names}


def reshaped(arrays: dict) -> dict:
    return arrays | {"blocks.1.mlp.fc1.weight": arrays["blocks.1.mlp.fc1.weight"][:-1]}


@pytest.mark.parametrize(
    "spoil, said",
    [
        (without("blocks.1.attn.qkv.bias"), r"missing \(1\): blocks_1/attn/qkv/bias"),
        (without("pos_embed"), "lacks pos_embed"),
        (reshaped, r"blocks_1/mlp/fc1/kernel: expected \(64, 256\), found \(64, 255\)"),
        (lambda arrays: arrays | {"surplus": np.zeros(1)}, r"surplus \(1,\): matched by 0 rules"),
        (without(*(f"blocks.0.{n}" for n in ("norm1.weight", "norm1.bias"))), "lacks blocks_0/norm1/scale"),
    ],
)
def test_a_spoiled_backbone_leaves_nothing_behind(tmp_path, spoil, said):
    foreign = formats.write("dinov2", arrays_of(NETWORKS["plain"]), "test")
    files.write(tmp_path / "x.safetensors", spoil(foreign))
    for to in convert.WRITERS:
        with pytest.raises(WeightsError, match=said):
            convert.convert(str(tmp_path / "x.safetensors"), tmp_path / "out", to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]


def test_a_spoiled_head_leaves_nothing_behind(tmp_path):
    folder = hub(tmp_path / "hub", NETWORKS["plain"], heads=["dino_head"])
    head = formats.write("dino_head", head_arrays(), "test")
    torch = pytest.importorskip("torch")
    whole = formats.write("dinov2", arrays_of(NETWORKS["plain"]), "test")
    teacher = {f"backbone.{n}": v for n, v in whole.items()} | {f"dino_head.{n}": v for n, v in head.items()}
    del teacher["dino_head.last_layer.weight_v"], head["mlp.2.bias"]
    torch.save({"teacher": {n: torch.from_numpy(v) for n, v in teacher.items()}}, folder / "teacher.pth")
    with pytest.raises(WeightsError, match=r"missing \(1\): last_layer/weight_v"):
        convert.convert(str(folder / "teacher.pth"), tmp_path / "out", "hf")
    files.write(folder / "dino_head.safetensors", head)
    with pytest.raises(WeightsError, match=r"\(dino_head\) does not fit.*\n.*missing \(1\): mlp_2/bias"):
        convert.convert(str(folder), tmp_path / "out", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    source = str(hub(tmp_path / "hub", NETWORKS["plain"], heads=["dino_head"]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "_write_heads", full)
    with pytest.raises(OSError, match="No space"):
        convert.convert(source, tmp_path / "out", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"]


def test_networks_that_are_not_converted(tmp_path):
    from conversion_test import NETWORKS as ALL

    files.write(
        tmp_path / "clip.safetensors", formats.write("clip_openai", arrays_of(ALL["clip_openai"][0]), "test")
    )
    files.write(tmp_path / "head.safetensors", formats.write("dino_head", head_arrays(), "test"))
    for name, said in [
        ("clip", "clip_openai weights"),
        ("head", "no encoder"),
        ("nothing", "neither an encoder"),
    ]:
        with pytest.raises(WeightsError, match=said):
            convert.convert(str(tmp_path / f"{name}.safetensors"), tmp_path / "out", "hf")
    with pytest.raises(WeightsError, match="no network that DINOv2 training can continue"):
        encoders.load_modules(str(tmp_path / "clip.safetensors"))


# --- a workdir, transformers, and the command ---------------------------------------------------------------


TINY = {
    "batch_size": 8,
    "group_size": 1,
    "koleo_group": 4,
    "steps": 2,
    "log_every": 1,
    "checkpoint_every": 2,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.patch_size": 8,
    "model.image_size": 48,
    "views.global_size": 48,
    "views.local_size": 24,
    "head.prototypes": 16,
    "head.bottleneck": 8,
    "head.hidden": 16,
    "data.image_size": 48,
    "data.synthetic_size": 16,
}


def small_quickstart():
    config = quickstart.get_config()
    config.update_from_flattened_dict(TINY)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A workdir of the quickstart at test size, its weights fresh from the initialiser."""
    config, folder = small_quickstart(), tmp_path_factory.mktemp("runs") / "quickstart"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    store = checkpoints.Checkpoints(folder)
    store.save(2, {"teacher": jax.jit(train.objective_of(config).init)(jax.random.key(0))})
    store.close()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The same after two steps of training."""
    config, folder = small_quickstart(), tmp_path_factory.mktemp("runs") / "quickstart"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    train.run(config, folder)
    return folder


def real_films(n: int = 4) -> list[np.ndarray]:
    paths = sorted(Path(os.environ["RADDINO_CXR"]).glob("images/*"))[:: max(1, 500 // n)][:n]
    rng = np.random.default_rng(0)
    return [images.read(p) for p in paths] or [rng.integers(0, 256, (90, 70 + i), np.uint8) for i in range(n)]


@pytest.mark.parametrize("run", ["workdir", pytest.param("trained", marks=pytest.mark.slow)])
def test_the_quickstart_through_transformers(run, request, tmp_path):
    """Converted, opened by AutoModel, its own processor: the same features on real films."""
    workdir = request.getfixturevalue(run)
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from PIL import Image

    report = convert.convert(str(workdir), tmp_path / "hf", "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "synthetic radiographs: not for use on patients" in card and "2 of 8 films" in card
    films, encoder = real_films(), encoders.load(str(workdir))
    films.append(films[0] // 32)  # so dark that a grey level counts
    batch = encoder.preprocess(films)
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    assert not model.training and model.config.num_attention_heads == 2
    with torch.no_grad():
        out = model(torch.from_numpy(np.repeat(batch[..., 0][:, None], 3, axis=1)))
    ours = encoder(batch)
    patches = out.last_hidden_state[:, 1:].numpy().reshape(ours["patches"].shape)
    for found, expected in [(ours["cls"], out.pooler_output.numpy()), (ours["patches"], patches)]:
        assert np.abs(np.asarray(found) - expected).max() <= 2e-5 * np.abs(expected).max()
    assert encoder.settings.standardize and "standardised one by one" in report
    for i, film in enumerate(films):
        Image.fromarray(film).save(tmp_path / "film.png")
        found = use_as_told(tmp_path / "hf", tmp_path / "film.png")
        np.testing.assert_allclose(found["pixels"][0, 0], batch[i, ..., 0], atol=1e-5)
        for name, expected in [("cls", ours["cls"][i]), ("patches", ours["patches"][i].reshape(36, -1))]:
            assert np.abs(found[name][0].numpy() - expected).max() <= 2e-5 * np.abs(expected).max()


def use_as_told(folder: Path, film: Path) -> dict:
    """What the code in a folder's README.md leaves behind when a reader runs it."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert code.count("THIS FOLDER") >= 2 and code.count("FILM.png") == 1
    names = {}
    exec(code.replace("THIS FOLDER", str(folder)).replace("FILM.png", str(film)), names)
    return names


def test_the_card_leaves_out_what_a_network_does_not_need(tmp_path):
    """Registers come before the patches; films that were not standardised are not to be."""
    pytest.importorskip("transformers")
    from PIL import Image

    convert.convert(str(hub(tmp_path / "hub", NETWORKS["registers"])), tmp_path / "hf", "hf")
    assert "standardised" not in (tmp_path / "hf" / "README.md").read_text()
    film = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    Image.fromarray(film).save(tmp_path / "film.png")
    found, encoder = use_as_told(tmp_path / "hf", tmp_path / "film.png"), encoders.load(str(tmp_path / "hf"))
    expected = encoder(encoder.preprocess([film]))
    for name in ("cls", "patches"):
        wanted = np.asarray(expected[name]).reshape(found[name].shape)
        # ImageNet's statistics: their three channels, and our one that stands for all of them.
        assert np.abs(found[name].numpy() - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("to", ["hf", "torch", "orbax"])
def test_a_workdir_and_back(workdir, tmp_path, to):
    """With the head of the run, two heads of 16 at a width of 32, and how its films are prepared."""
    convert.convert(str(workdir), tmp_path / "out", to)
    before, after = (encoders.open_source(str(p), with_heads=True) for p in (workdir, tmp_path / "out"))
    assert before.modules.keys() == {"backbone", "dino_head"}
    for module, arrays in before.modules.items():
        equal(after.modules[module], arrays)
    assert after.fields["heads"] == 2
    assert before.preprocess.standardize and after.preprocess == before.preprocess
    assert after.fields | dict(offset=0.1) == before.fields
    both = [encoders.load(str(path)) for path in (workdir, tmp_path / "out")]
    np.testing.assert_array_equal(*(e(e.preprocess(real_films(1)))["cls"] for e in both))


def test_films_are_prepared_as_in_training(workdir, tmp_path):
    """What online evaluation sees of a film of the stored size; other sizes are resized first."""
    from raddino_jax import watch

    config = small_quickstart()
    config.data.image_size = 60  # of which the patches of 8 pixels cover 56
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    encoder = encoders.load(str(tmp_path / "run"))
    assert encoder.settings.resize == 60 and encoder.image_size == 56 and encoder.network.offset == 0.1
    film = np.random.default_rng(0).integers(0, 256, (60, 60), np.uint8)
    expected = watch.standardized(film[None, 2:58, 2:58], config)
    np.testing.assert_allclose(encoder.preprocess([film]), expected, atol=1e-5)
    wide = images.resize_short_side(real_films(1)[0], 60)
    np.testing.assert_array_equal(encoder.preprocess([real_films(1)[0]]), encoder.preprocess([wide]))
    assert "without the offset of DINOv2's hub" in convert.convert(str(tmp_path / "run"), tmp_path / "hf", "hf")


def test_the_torch_layout_loads_strict(workdir, tmp_path):
    """Into the architecture of the hub, key by key: timm's transformer has DINOv2's names but for the LayerScale's."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    convert.convert(str(workdir), tmp_path / "out", "torch")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "out" / "backbone_compatible.safetensors")
    mask_token = state.pop("mask_token")
    assert mask_token.shape == (1, 32)
    model = timm.models.VisionTransformer(
        img_size=48,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        init_values=1.0,
        global_pool="token",
    )
    model.load_state_dict(state, strict=True)
    encoder = encoders.load(str(tmp_path / "out"))
    batch = encoder.preprocess(real_films(2))
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(np.repeat(batch[..., 0][:, None], 3, axis=1))).numpy()
    found = np.asarray(encoder(batch)["cls"])
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_damaged_checkpoint(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "2" / "teacher").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"checkpoints/2 cannot be read"):
        encoders.load(str(tmp_path / "run"))
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(folder)
    with pytest.raises(WeightsError, match="no complete checkpoint"):
        encoders.load(str(tmp_path / "run"))
    with pytest.raises(WeightsError, match=r"no complete checkpoint of step 99 \(steps: 2\)"):
        encoders.load(str(workdir / "checkpoints" / "99"))
    shutil.copytree(workdir, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="expected the config of a training run"):
        encoders.load(str(tmp_path / "other"))


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "raddino_jax.convert", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})


def test_the_command(tmp_path, capsys):
    source = str(hub(tmp_path / "hub", NETWORKS["plain"], heads=["dino_head"]))
    done = run(source, str(tmp_path / "out"), "--to=hf")
    assert done.returncode == 0, done.stderr
    for expected in (
        "blocks_*/attn/qkv/kernel",
        "64x192 float32",
        "x 2",
        "checksum",
        "bytes, sha256",
        "dino_head: 8 arrays",
    ):
        assert expected in done.stdout, done.stdout
    assert convert.main([source, str(tmp_path / "out"), "--to=hf"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "dinov2"
