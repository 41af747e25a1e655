"""Weights formats: rules that cover every name once, files that are read without running anything, clear refusals."""

import argparse
import collections
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from raddino_jax import encoders
from raddino_jax import params as trees
from raddino_jax.conversion import files, formats, huggingface, rules, sources, tables
from raddino_jax.conversion.rules import Rule, WeightsError
from raddino_jax.models.clip import CLIPViT, Projected
from raddino_jax.models.heads import DINOHead
from raddino_jax.models.resnet import BioViLT
from raddino_jax.models.vit import ViT


def arrays_of(network, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random parameters of a network by our names."""
    rng = np.random.default_rng(0)
    size = getattr(network, "trunk", network).image_size
    flat = trees.flatten(encoders.expected_params(network, size))
    return {name: rng.normal(size=leaf.shape).astype(dtype) for name, leaf in flat.items()}


def head_arrays(width: int = 64, layers: int = 3, prototypes: int = 24) -> dict[str, np.ndarray]:
    import jax

    head = DINOHead(prototypes, 32, 16, layers)
    tree = jax.eval_shape(head.init, jax.random.key(0), jax.ShapeDtypeStruct((1, width), np.float32))["params"]
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in trees.flatten(tree).items()}


SMALL = dict(width=64, depth=2, heads=4, image_size=28, layerscale=1.0)
TIMM = ViT(64, 2, 4, patch_size=16, image_size=32, layerscale=0.0, mask_token=False)
NETWORKS = {
    "dinov2": [
        ViT(**SMALL),
        ViT(**SMALL, registers=4),
        ViT(**SMALL, ffn="swiglu"),
        ViT(**SMALL | dict(layerscale=0.0)),
    ],
    "hf_dinov2": [ViT(**SMALL), ViT(**SMALL, registers=4, ffn="swiglu")],
    "clip_hf": [CLIPViT(64, 2, 4, 14, 28, projection=32), CLIPViT(64, 2, 4, 14, 28)],
    "clip_openai": [CLIPViT(64, 2, 4, 14, 28, projection=32)],
    "biomedclip": [Projected(TIMM, 32)],
    "mrm": [TIMM],
    "biovil_t": [BioViLT((1, 2, 1, 1), width=4, fused=8, projection=4)],
}
CASES = [
    pytest.param(name, network, id=f"{name}-{i}")
    for name, nets in NETWORKS.items()
    for i, network in enumerate(nets)
]


def equal(found: dict, expected: dict) -> None:
    """Same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# --- the tables -------------------------------------------------------------------------------------------------


def test_every_format_has_a_case():
    assert set(NETWORKS) | {"dino_head"} == set(formats.FORMATS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name, network", CASES)
def test_there_and_back(name, network, dtype):
    """Every parameter has its place in the format, and comes back bit by bit."""
    ours = arrays_of(network, dtype)
    foreign = formats.write(name, ours, "test")
    assert all(value.flags.c_contiguous for value in foreign.values())
    found, modules = formats.read(foreign, "test", () if name != "mrm" else ("mrm",))
    assert found == name
    equal(modules["backbone"], ours)
    equal(formats.write(name, modules["backbone"], "test"), foreign)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_heads_there_and_back(layers):
    ours = head_arrays(layers=layers)
    foreign = formats.write("dino_head", ours, "test")
    name, modules = formats.read(foreign, "test")
    assert name == "dino_head"
    equal(modules["dino_head"], ours)


def test_names_of_a_checkpoint_of_training():
    """Chunked blocks, wrappers of DistributedDataParallel, and all three modules."""
    network = ViT(**SMALL)
    ours = {"backbone": arrays_of(network), "dino_head": head_arrays(), "ibot_head": head_arrays(prototypes=12)}
    foreign = {}
    for module, arrays in ours.items():
        kind = "dinov2" if module == "backbone" else "dino_head"
        for name, value in formats.write(kind, arrays, "test").items():
            chunked = name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0.")
            foreign[f"module.{module}.{chunked}"] = value
    name, modules = formats.read(foreign, "test")
    assert name == "dinov2"
    for module, arrays in ours.items():
        equal(modules[module], arrays)


def test_names_of_transformers_in_memory():
    """q_proj for attention.query, gate_proj and up_proj for weights_in: what a state dict of transformers 5 has."""
    ours = arrays_of(ViT(**SMALL, ffn="swiglu"))
    foreign = rules.write(
        [
            *tables.HF_DINOV2_IN_MEMORY,
            *[r for r in tables.HF_DINOV2 if not any(a.ours == r.ours for a in tables.HF_DINOV2_IN_MEMORY)],
        ],
        ours,
        "test",
    )
    assert (
        "encoder.layer.0.attention.q_proj.weight" in foreign and "encoder.layer.1.mlp.up_proj.bias" in foreign
    )
    equal(formats.read(foreign, "test")[1]["backbone"], ours)
    both = foreign | formats.write("hf_dinov2", ours, "test")
    with pytest.raises(WeightsError, match=r"blocks_0/attn/qkv/kernel: given 2 times"):
        formats.read(both, "test")


REFUSED = [
    ({"extra.weight": (2,)}, r"extra\.weight \(2,\): matched by 0 rules"),
    ({"blocks.2.attn.qkvs.weight": (2, 2)}, r"blocks\.2\.attn\.qkvs\.weight"),
    ({"blocks.0.0.norm1.weight": (64,)}, r"have the name of another one"),
    ({"_fsdp_wrapped_module._flat_param": (9,)}, "one shard of a run of DINOv2"),
]


@pytest.mark.parametrize("added, said", REFUSED)
def test_names_that_do_not_fit(added, said):
    foreign = formats.write("dinov2", arrays_of(ViT(**SMALL)), "test")
    with pytest.raises(WeightsError, match=said):
        formats.read(foreign | {name: np.zeros(shape) for name, shape in added.items()}, "test")


def test_a_missing_third_of_qkv():
    foreign = formats.write("hf_dinov2", arrays_of(ViT(**SMALL)), "test")
    del foreign["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(WeightsError, match=r"encoder\.layer\.1\.attention\.attention\.key\.bias: missing"):
        formats.read(foreign, "test")


def test_doubly_matched_names_either_way():
    twice = [Rule("a.{i}", "b_{i}"), Rule("a.0", "c")]
    with pytest.raises(WeightsError, match=r"a\.0 \(1,\): matched by 2 rules"):
        rules.read(twice, {"a.0": np.zeros(1)}, "test")
    with pytest.raises(WeightsError, match=r"b_0 \(1,\): matched by 2 rules"):
        rules.write([Rule("a.{i}", "b_{i}"), Rule("c", "b_0")], {"b_0": np.zeros(1)}, "test")


def test_an_unknown_format():
    with pytest.raises(WeightsError, match=r"found 1 parameters: lm_head\.weight"):
        formats.read({"lm_head.weight": np.zeros(1)}, "test")


# --- files ------------------------------------------------------------------------------------------------------


def saved(torch, value, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def tensors(torch) -> dict:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "whole": base,
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "long": base.long(),
        "bool": base > 3,
        "parameter": torch.nn.Parameter(base * 2),
        "int8": base.to(torch.int8),
    }


@pytest.mark.parametrize("wrapped", ["", "model", "teacher", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(tmp_path, zipped, wrapped):
    """Ours reads what torch reads, in the new form and, through torch, in that of before 2020."""
    torch = pytest.importorskip("torch")
    named = tensors(torch)
    content = {wrapped: named, "epoch": 3, "optimizer": {"state": {}}} if wrapped else named
    (tmp_path / "x.pth").write_bytes(saved(torch, content, _use_new_zipfile_serialization=zipped))
    found = files.read(tmp_path / "x.pth")
    assert found.keys() == named.keys()
    for name, value in named.items():
        value = value.detach()
        expected = (
            value.float().numpy().astype(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()
        )
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape, name
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


class Attack:
    """A pickle that runs a command when it is opened in the ordinary way."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    touched, path = tmp_path / "touched", tmp_path / "x.pth"
    path.write_bytes(
        saved(torch, {"w": torch.zeros(1), "x": Attack(touched)}, _use_new_zipfile_serialization=zipped)
    )
    with pytest.raises(WeightsError, match=r"asks to run \w+\.system, .*nothing was run") as refused:
        files.read(path)
    assert not touched.exists() and "weights_only" not in str(refused.value)  # torch would tell how to run it
    torch.load(path, weights_only=False)  # the attack is a real one
    assert touched.exists()


GLOBALS = [
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("os", "system"),
    ("torch", "load"),
    ("numpy", "load"),
    ("torch._utils", "os"),
]


@pytest.mark.parametrize("module, name", GLOBALS)
def test_only_what_tensors_need_is_answered(tmp_path, module, name):
    data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"q\x00X\x01\x00\x00\x001q\x01\x85R."
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
    with pytest.raises(WeightsError, match=rf"{module}\.{name}"):
        files.read(path)


def crafted(path: Path, offset: int, shape: tuple, strides: tuple, numbers: int = 6) -> Path:
    """A PyTorch file with one tensor whose place in its storage is given."""
    torch = pytest.importorskip("torch")
    path.write_bytes(saved(torch, {"w": torch.zeros(numbers)}))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))

    class Writer(pickle._Pickler):
        def persistent_id(self, value):
            return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    class Tensor:
        def __reduce__(self):
            storage = ("storage", torch.FloatStorage, "0", "cpu", numbers)
            return torch._utils._rebuild_tensor_v2, (
                storage,
                offset,
                shape,
                strides,
                False,
                collections.OrderedDict(),
            )

    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump({"w": Tensor()})
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in entries.items():
            archive.writestr(name, buffer.getvalue() if name == pickled else value)
    return path


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (7,), (1,)),
        (4, (3,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (5, 2)),
        (3, (2,), (-3,)),
        (10**15, (1,), (1,)),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage(tmp_path, offset, shape, strides):
    np.testing.assert_array_equal(
        files.read(crafted(tmp_path / "good.pth", 1, (2, 2), (2, 1)))["w"], np.zeros((2, 2))
    )
    with pytest.raises(WeightsError, match="beyond its storage"):
        files.read(crafted(tmp_path / "x.pth", offset, shape, strides))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_cut_off_anywhere(tmp_path, suffix):
    arrays = {"a": np.ones((7, 3), np.float32), "b": np.zeros(5, np.float16)}
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "pth":
        torch = pytest.importorskip("torch")
        whole.write_bytes(saved(torch, {name: torch.from_numpy(value) for name, value in arrays.items()}))
    else:
        files.write(whole, arrays)
    equal(files.read(whole), arrays)
    data, path = whole.read_bytes(), tmp_path / f"cut.{suffix}"
    for length in [0, 1, 5, 9, *range(11, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError) as refused:
            files.read(path)
        assert str(path) in str(refused.value)


def test_damaged_numbers_are_noticed(tmp_path):
    torch = pytest.importorskip("torch")
    data = bytearray(saved(torch, {"w": torch.arange(1000.0)}))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        files.read(tmp_path / "x.pth")


STRANGERS = [
    (b"", "an empty file"),
    (b"<!DOCTYPE html><html>", "an HTML or XML page"),
    (b"hello world", "something else"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer"),
    (b"PK\x03\x04rest", "damaged or cut off"),
    (b"\x80\x02nonsense", "damaged|not weights"),
    (b'\x10\0\0\0\0\0\0\0{"a": 1}        ', "no whole safetensors"),
]


@pytest.mark.parametrize("data, said", STRANGERS)
def test_other_files(tmp_path, data, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=said):
        files.read(path)


def test_other_pickles_and_archives(tmp_path):
    torch = pytest.importorskip("torch")
    for content, said in [
        ([1, 2], "found list"),
        ({"lr": 1.0}, "found a dict of lr"),
        (torch.zeros(2), "found Tensor"),
    ]:
        (tmp_path / "x.pth").write_bytes(saved(torch, content))
        with pytest.raises(WeightsError, match=said):
            files.read(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("notes.txt", "no weights")
    with pytest.raises(WeightsError, match="a zip archive without weights"):
        files.read(tmp_path / "x.zip")


def test_settings_beside_weights_stay_inert(tmp_path):
    torch = pytest.importorskip("torch")
    settings = argparse.Namespace(lr=1.0, output_dir=Path("x"))
    (tmp_path / "x.pth").write_bytes(saved(torch, {"model": {"w": torch.ones(2)}, "args": settings}))
    equal(files.read(tmp_path / "x.pth"), {"w": np.ones(2, np.float32)})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, kind):
    parts = [
        {"a": np.arange(3.0, dtype=np.float32)},
        {"b": np.ones((2, 2), np.float16), "c": np.zeros(1, np.float32)},
    ]
    names = [f"model-0000{i}-of-00002.{kind}" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        if kind == "bin":
            torch = pytest.importorskip("torch")
            (tmp_path / name).write_bytes(saved(torch, {k: torch.from_numpy(v) for k, v in part.items()}))
        else:
            files.write(tmp_path / name, part)
    index = tmp_path / ("pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json")
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    equal(files.read(files.find(tmp_path)), parts[0] | parts[1])
    (tmp_path / names[1]).unlink()
    with pytest.raises(WeightsError, match=f"1 of 2 shards are not there: {names[1]}"):
        files.read(index)
    index.write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(WeightsError, match="expected names of files beside it"):
        files.read(index)


def test_bfloat16_in_safetensors(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)}
    files.write(tmp_path / "x.safetensors", arrays)
    equal(files.read(tmp_path / "x.safetensors"), arrays)


# --- what a source says of its network ----------------------------------------------------------------------


def hub_file(folder: Path, network=None, **fields) -> Path:
    network = network or ViT(**dict(SMALL, heads=1) | fields)
    path = folder / "hub.safetensors"
    files.write(path, formats.write("dinov2", arrays_of(network), "test"))
    return path


@pytest.mark.parametrize(
    "fields", [{}, dict(registers=4), dict(ffn="swiglu"), dict(layerscale=0.0), dict(mask_token=False, depth=3)]
)
def test_a_network_is_told_from_its_arrays(tmp_path, fields):
    network = ViT(**dict(SMALL, heads=1) | fields)
    path = hub_file(tmp_path, network)
    with pytest.warns(UserWarning, match="none of those has a width of 64"):
        source = sources.describe(sources.open_path(path), path)
    told = ViT(**source.fields)
    assert (told.antialias, told.offset) == ((True, 0.0) if network.registers else (False, 0.1))
    assert told.clone(antialias=False, offset=0.1) == network
    assert any("heads of 64" in note for note in source.notes)


def test_heads_that_cannot_be_told(tmp_path):
    path = hub_file(tmp_path, width=32)
    with pytest.raises(WeightsError, match="number of heads cannot be told"):
        sources.describe(sources.open_path(path), path)
    fields = dict(SMALL, width=32, heads=2, patch_size=14, registers=0, ffn="mlp")
    (tmp_path / "config.json").write_text(json.dumps(huggingface.write_config(fields, "float32")))
    assert sources.describe(sources.open_path(path), path).fields["heads"] == 2


def test_a_config_of_another_network(tmp_path):
    path = hub_file(tmp_path)
    fields = dict(SMALL, heads=1, depth=5, patch_size=14, registers=0, ffn="mlp")
    (tmp_path / "config.json").write_text(json.dumps(huggingface.write_config(fields, "float32")))
    with pytest.raises(WeightsError, match="depth: 2 in the weights, 5 in config.json"):
        sources.describe(sources.open_path(path), path)


CONFIG = huggingface.write_config(dict(SMALL, patch_size=14, registers=0, ffn="mlp"), "float32")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(model_type="bert"), "found 'bert'"),
        (dict(hidden_act="relu"), "hidden_act='relu'"),
        (dict(mlp_ratio=3), "mlp_ratio=3"),
        (dict(layer_norm_eps=1e-5), "layer_norm_eps"),
        (dict(hidden_size=None), "hidden_size"),
    ],
)
def test_configs_that_are_refused(change, said):
    assert huggingface.read_config(CONFIG, "test")[0] == "hf_dinov2"
    with pytest.raises(WeightsError, match=said):
        huggingface.read_config(CONFIG | change, "test")


PROCESSOR = huggingface.write_preprocess(huggingface.Preprocess(64, 56, (0.5,), (0.25,)))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(size={"height": 56, "width": 56}), "size: expected one side"),
        (dict(crop_size={"height": 56, "width": 70}), "crop_size"),
        (dict(resample=0), "resample=0"),
        (dict(rescale_factor=1.0), "rescale_factor=1.0"),
        (dict(do_normalize=False), "do_normalize"),
        (dict(crop_size=70), "a crop inside"),
        (dict(do_center_crop=False), "centre crop"),
        (dict(image_mean=[0.5]), "three channels"),
    ],
)
def test_processors_that_are_refused(change, said):
    settings = huggingface.read_preprocess(PROCESSOR, "test")
    assert settings == huggingface.Preprocess(64, 56, (0.5,), (0.25,))
    assert huggingface.read_preprocess(PROCESSOR | dict(size=64, crop_size=56), "test") == settings
    with pytest.raises(WeightsError, match=said):
        huggingface.read_preprocess(PROCESSOR | change, "test")


# --- the Hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, repository: str, contents: dict[str, bytes]) -> Path:
    """Put files into the cache as a download would."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text("0" * 40)
    for name, content in contents.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def test_a_repository_in_the_cache(cache, tmp_path):
    weights = formats.write("hf_dinov2", arrays_of(ViT(**SMALL)), "test")
    files.write(tmp_path / "model.safetensors", weights)
    contents = {
        "model.safetensors": (tmp_path / "model.safetensors").read_bytes(),
        "config.json": json.dumps(CONFIG).encode(),
    }
    snapshot = cached(cache, "someone/something", contents)
    assert huggingface.fetch_folder("someone/something") == snapshot
    encoder = encoders.load("hf:someone/something")
    assert encoder.network.depth == 2 and any("ImageNet" in note for note in encoder.notes)


@pytest.mark.parametrize("name", ["hf:someone/something", "rad_dino", "biomedclip"])
def test_offline_without_a_cache(cache, name):
    with pytest.raises(WeightsError, match=r"cannot be reached.*hf download"):
        encoders.load(name)


def test_the_cache_comes_first(cache, monkeypatch):
    """What is there is not asked for again; what is not is downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repository, name, local_files_only=False):
        asked.append((name, local_files_only))
        if local_files_only and name != "config.json":
            raise LocalEntryNotFoundError("not in the cache")
        return f"/cache/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert huggingface.fetch("someone/something", "config.json") == Path("/cache/config.json")
    assert huggingface.fetch("someone/something", "model.safetensors") == Path("/cache/model.safetensors")
    assert asked == [("config.json", True), ("model.safetensors", True), ("model.safetensors", False)]


def test_a_cached_repository_without_weights(cache):
    cached(cache, "someone/something", {"config.json": b"{}"})
    with pytest.raises(WeightsError, match="no weights that can be reached"):
        encoders.load("hf:someone/something")


def test_a_name_of_no_repository(cache):
    with pytest.raises(WeightsError, match="expected hf:owner/name"):
        encoders.load("hf:some one/some/thing")
    for name in ("chexzero", "mrm"):
        with pytest.raises(WeightsError, match="not on the Hugging Face Hub; get them from https://github.com"):
            encoders.load(name)
