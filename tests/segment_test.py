"""task=segment from one end to the other on small films: heads, rows, curves, kills and resumptions, predictions."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import predict as predict_config
from configs import probe as probe_config
from configs import segment as segment_config
from raddino_jax import encoders, logs
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.data.cases import CaseError
from raddino_jax.evals import dice, fast, features, fit, heads, maps, patches, predict, segment, splits, varied
from raddino_jax.models import attention
from raddino_jax.models.clip import CLIPViT, Projected
from raddino_jax.models.resnet import BioViLT
from raddino_jax.models.vit import ViT

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32


def vit(**fields):
    return ViT(**(dict(width=16, depth=4, heads=2, patch_size=8, image_size=SIZE, layerscale=1.0) | fields))


def encoder(network=None, name="tiny", settings=None, feature="cls"):
    network = network or vit()
    settings = settings or Preprocess(SIZE, SIZE, (0.5,), (0.25,))
    return encoders.Encoder(name, network, encoders.random_params(network, settings.crop), settings, feature)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(encoders, "load", lambda *_, **__: encoder())


def config(arguments="head=unet", **fields) -> ConfigDict:
    """The real config on 24 films of 32 pixels, with networks of a few channels."""
    given = segment_config.get_config(f"small,dataset=synthetic,{arguments}")
    given.data.update(films=24, image_size=48)
    given.unet.filters = (4, 8)
    given.update(image_size=SIZE, epochs=2, encoder="tiny", head_width=4, overlays=1, log_every=1)
    given.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return given


def start(given, workdir):
    """As main does it."""
    workdir.mkdir(parents=True, exist_ok=True)
    logs.write_whole(workdir / "config.json", given.to_json())
    segment.run(given, workdir)
    path = workdir / "results.json"
    return json.loads(path.read_text(), parse_constant=pytest.fail) if path.exists() else None  # NaN is no JSON


# --- the encoder's layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [vit(depth=12, registers=2), vit(depth=2)])
def test_layers_are_the_blocks_under_the_final_norm(network):
    one = encoder(network)
    batch = one.preprocess([np.arange(48 * 40, dtype=np.uint32).reshape(48, 40).astype(np.uint8)])
    found, stages = np.asarray(one.compiled(one.maps)(one.params, batch)), one.stages(batch)
    blocks = (2, 5, 8, 11) if network.depth == 12 else (0, 0, 1, 1)
    for k, i in enumerate(blocks):
        tokens = np.asarray(stages[f"blocks_{i}"])[0, 1 + network.registers :]
        centred = tokens - tokens.mean(-1, keepdims=True)
        expected = centred / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)  # fresh norms have scale 1 and bias 0
        np.testing.assert_allclose(found[0, k].reshape(16, -1), expected, atol=1e-4)
    np.testing.assert_allclose(found[:, -1], one(batch)["patches"], atol=1e-5)
    last = one.compiled(one.maps, static_argnums=2)(one.params, batch, 1)
    np.testing.assert_allclose(last[:, 0], one(batch)["patches"], atol=1e-5)


@pytest.mark.parametrize("network", [vit(depth=3, registers=2), CLIPViT(16, 3, 2, patch_size=8, image_size=SIZE)])
def test_a_block_counted_from_the_end(network):
    """Patches without class token and registers; under the final norm where the network has one for them."""
    one = encoder(network)
    batch = one.preprocess([np.arange(48 * 40, dtype=np.uint32).reshape(48, 40).astype(np.uint8)])
    np.testing.assert_allclose(one.block(one.params, batch), one(batch)["patches"], atol=1e-5)
    tokens = np.asarray(one.stages(batch)["blocks_1"])[0, -16:]
    if isinstance(network, ViT):
        tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(one.block(one.params, batch, -2)[0].reshape(16, -1), tokens, atol=1e-4)
    np.testing.assert_array_equal(one.block(one.params, batch, 1), one.block(one.params, batch, -2))
    for place in (3, -4):
        with pytest.raises(ValueError, match=f"has 3 blocks, no block {place}"):
            one.block(one.params, batch, place)


def _patches_for_a_writer(one, films, folder):
    pairs = SimpleNamespace(film=lambda place: films[place])
    patches.Eye(one, -1).kept(pairs, np.arange(3), str(folder), batch=2, threads=1)


def _probed_with_variation(one, films, folder):
    given = probe_config.get_config("fast,dataset=synthetic")
    given.update(features_dir=str(folder))
    source = features.Films(SimpleNamespace(film=lambda place: films[place]), np.arange(8))
    cut, y = [splits.Split(np.arange(8), np.arange(0), np.arange(0))], np.arange(8.0)[:, None] % 2
    varied.fit(source, y, cut, one, np.zeros((8, 16)), given, fast.Recipe(lrs=(1e-2,), epochs=1, batch_size=8))


def _head(one):
    head = heads.Head(heads.DECODERS["linear"](1), one.settings, one)
    return head, head.init(jax.random.key(0))


READERS = {
    "the encoder itself": lambda one, films, _: one(one.preprocess(films)),
    "masks of films": lambda one, films, _: segment.predictor(
        *_head(one), fit.Films(np.stack(films), None), batch_size=8)(np.arange(3)),
    "masks of one film": lambda one, films, _: segment.compiled(*_head(one))(films[0][None]),
    "features once": lambda one, films, _: segment._features(_head(one)[0], np.stack(films), config("head=linear")),
    "patches for a writer": _patches_for_a_writer,
    "attention maps": lambda one, films, _: maps.attention_maps(one, films),
    "a probe with variation": _probed_with_variation,
}


@pytest.mark.parametrize("name", READERS)
def test_attention_has_the_mesh_in_sight_and_multiplies_in_float32(name, monkeypatch, tmp_path):
    """Without the mesh a TPU's kernel cannot be split over devices, and several chips compile nothing."""
    one, seen = encoder(), []

    def spy(q, k, v):
        seen.append((jax.sharding.get_abstract_mesh().size, jax.config.jax_default_matmul_precision))
        return attention.BACKENDS["xla"](q, k, v)

    monkeypatch.setitem(attention.BACKENDS, jax.default_backend(), spy)
    monkeypatch.setattr(features, "kept", lambda about, films, folder, compute: np.concatenate(list(compute(films))))
    READERS[name](one, list(np.zeros((8, SIZE, SIZE), np.uint8)), tmp_path)
    assert seen and set(seen) == {(jax.device_count(), "highest")}


def test_layers_of_other_networks():
    clip = encoder(CLIPViT(16, 4, 2, patch_size=8, image_size=SIZE))
    joined = encoder(Projected(vit(), 8))
    for one in (clip, joined):
        batch = one.preprocess([np.eye(40, dtype=np.uint8) * 200])
        found = one.compiled(one.maps)(one.params, batch)
        assert found.shape == (1, 4, 4, 4, 16)
        np.testing.assert_allclose(found[:, -1], one(batch)["patches"], atol=1e-5)
    settings = Preprocess(64, 64, (0.5,), (0.25,))
    resnet = encoder(BioViLT((1, 1, 1, 1), 4, image_size=64), settings=settings, feature="patch_mean")
    with pytest.raises(ValueError, match="has no blocks, of which 4 could be read"):
        resnet.maps(resnet.params, np.zeros((1, 64, 64, 1), np.float32))


# --- heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    Preprocess(SIZE, SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), Preprocess(40, SIZE, (100.0,), (80.0,), scale=255.0),
    Preprocess(SIZE, SIZE, (0.5,), (0.25,), standardize=True),
])  # fmt: skip
def test_levels_reach_the_encoder_as_it_prepares_them(settings):
    from raddino_jax.evals import frames

    one = encoder(settings=settings)
    film = np.random.default_rng(0).integers(0, 256, (50, 44), np.uint8)
    head = heads.Head(heads.DECODERS["linear"](1), settings, one)
    levels, _ = frames.framed(film, settings)
    found = head.features(head.frozen, jnp.asarray(levels)[None])[:, 0]
    np.testing.assert_allclose(found, one(one.preprocess([film]))["patches"], atol=2e-4)


@pytest.mark.parametrize("name", heads.HEADS)
def test_every_head_answers_every_pixel(name, tiny):
    given = config(f"head={name}", effunet__scale=(0.3, 0.3), effunet__decoder=(4, 4, 4, 4, 4))
    head = heads.build(given, structures=3)
    variables = head.init(jax.random.key(0))
    levels = jnp.zeros((2, SIZE, SIZE), jnp.uint8)
    logits = jax.jit(lambda: head.logits(variables, head.features(head.frozen, levels)))()
    assert logits.shape == (2, SIZE, SIZE, 3) and logits.dtype == jnp.float32


def test_an_encoder_may_see_larger_squares(tiny):
    head = heads.build(config("head=linear", image_size=2 * SIZE), 1)
    levels = jnp.zeros((1, 2 * SIZE, 2 * SIZE), jnp.uint8)
    assert head.features(head.frozen, levels).shape == (1, 1, 8, 8, 16)
    with pytest.raises(CaseError, match="image_size=36: tiny takes multiples of 8 pixels"):
        heads.build(config("head=linear", image_size=36), 1)


# --- the run ------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_without_augmentation_is_asked_once_per_film(tiny, monkeypatch, tmp_path):
    """And learns what it would learn if it were asked in every step."""
    losses = []
    for featured in (True, False):
        given = config("head=linear", augment=not featured, deformation__affine=0.0, deformation__intensity=0.0)
        start(given, tmp_path / str(featured))
        losses.append([row["loss"] for row in logs.read_metrics(tmp_path / str(featured))])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    task = segment.Task.open(config("head=linear", augment=False))
    assert task.films.featured and task.films.inputs.shape == (24, 1, 4, 4, 16)
    with pytest.raises(CaseError, match="take 0.0 GiB, config.features_gib allows 0"):
        segment.Task.open(config("head=linear", augment=False, features_gib=0.0))


def test_a_head_learns_and_is_told_apart_from_the_mean_mask(tmp_path):
    """Bright discs at random places: the U-Net finds them, the mean of the training masks cannot."""
    rng, rows = np.random.default_rng(0), [("file", "mask_file", "patient_id", "split", "ward")]
    y, x = np.mgrid[:48, :40]
    for i in range(30):
        row, column = rng.integers(12, 36), rng.integers(10, 30)
        disc = (y - row) ** 2 + (x - column) ** 2 < 64
        film = (60 + 120 * disc + rng.normal(0, 10, disc.shape)).clip(0, 255).astype(np.uint8)
        empty = i >= 28
        for name, picture in (("film", film * 0 if empty else film), ("mask", 255 * disc * (not empty))):
            Image.fromarray(np.asarray(picture, np.uint8)).save(tmp_path / f"{name}{i}.png")
        split = "train" if i < 18 else "val" if i < 22 else "test"
        rows.append((f"film{i}.png", f"mask{i}.png", f"p{i // 2}", split, "ABC"[i % 2]))
    with (tmp_path / "films.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    given = config("head=unet", dataset="folder", data__csv=str(tmp_path / "films.csv"), structures=("disc>0",),
                   epochs=30, lr=1e-2, strata=("ward",), fit="pad")
    found = start(given, tmp_path / "run")
    of = {(r["encoder"], r["metric"], r["class"], r.get("stratum", "")): r for r in found}
    unet, mean = of["none", "dice", "macro", ""], of["mean mask", "dice", "macro", ""]
    assert unet["value"] > 0.9 > 0.7 > mean["value"]
    assert unet["n"] == 6 and unet["films"] == 18 and unet["data"] == "real" and unet["head"] == "unet"
    assert unet["interval"][0] <= unet["value"] <= unet["interval"][1]
    assert of["none", "dice_native", "macro", ""]["value"] > 0.85
    assert of["none", "false_positive_rate", "disc", ""]["n"] == 2
    wards = [of["none", "dice", "macro", f"ward={ward}"] for ward in "AB"]
    assert sum(row["n"] * row["value"] for row in wards) == pytest.approx(6 * unet["value"])
    assert of["none", "dice", "macro", "ward: worst"]["value"] == min(row["value"] for row in wards)
    lines = list(csv.DictReader((tmp_path / "run" / "cases.csv").open()))
    assert len(lines) == 2 * 8
    ward = [float(line["dice"]) for line in lines if line["encoder"] == "none" and line["dice"] and line["id"][4:6]
            in ("22", "24", "26")]
    assert wards[0]["std"] == pytest.approx(np.std(ward, ddof=1), abs=1e-5)
    known = [float(line["dice"]) for line in lines if line["encoder"] == "none" and line["dice"]]
    assert np.mean(known) == pytest.approx(unet["value"], abs=1e-5)
    assert len(list((tmp_path / "run" / "overlays").glob("*.png"))) == 1
    _predict(tmp_path)


def _predict(tmp_path):
    """Masks of films in a folder, among them one that is none."""
    films = tmp_path / "films"
    films.mkdir()
    for i in (22, 23):
        shutil.copy(tmp_path / f"film{i}.png", films)
    (films / "page.png").write_text("<html>")
    given = predict_config.get_config()
    given.update(images=str(films), out=str(tmp_path / "out"))
    predict.run(given, tmp_path / "run")
    for i in (22, 23):
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"film{i}.png"))
        truth = np.asarray(Image.open(tmp_path / f"mask{i}.png"))
        assert set(np.unique(mask)) == {0, 255} and mask.shape == truth.shape
        assert dice.dice(mask[None] > 0, (truth[None] > 0).astype(np.uint8))[0] > 0.8
        assert Image.open(tmp_path / "out" / "overlays" / f"film{i}.png").size == (40, 48)
    assert "page.png" in (tmp_path / "out" / "rejects.csv").read_text()


def test_an_interrupted_run_goes_on_and_a_finished_one_is_not_run_again(tmp_path, monkeypatch, capsys):
    """Ended in step 5 of 6, two steps after a checkpoint: losses and rows are those of a run that was left alone."""
    given = config(checkpoint_every=3)
    whole, tell = start(given, tmp_path / "whole"), logs.tell_step

    def failing(metrics, meter, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        tell(metrics, meter, step, *rest)

    monkeypatch.setattr(logs, "tell_step", failing)
    with pytest.raises(KeyboardInterrupt):
        start(given, tmp_path / "resumed")
    monkeypatch.setattr(logs, "tell_step", tell)
    assert start(given, tmp_path / "resumed") == whole
    assert "resumed from step 3 of 6" in capsys.readouterr().err
    losses = [
        [(row["step"], row["loss"], row.get("val_loss")) for row in logs.read_metrics(tmp_path / name)]
        for name in ("whole", "resumed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    before = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert start(given, tmp_path / "whole") == whole
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == before


def test_a_curve_over_numbers_of_films_and_seeds(tmp_path):
    given = config(shots=(4, 0, 100), seeds=2, epochs=1, min_steps=2, eval_every=2)
    found = start(given, tmp_path)
    folders = sorted(p.name for p in tmp_path.glob("films_*"))
    assert folders == [f"films_{n}_seed_{seed}" for n in (18, 4) for seed in (0, 1)]
    means = [r for r in found if isinstance(r["seed"], list) and r["metric"] == "dice" and r["class"] == "macro"]
    assert sorted((r["encoder"], r["films"], r["folds"]) for r in means) == [
        (name, n, 2) for name in ("mean mask", "none") for n in (4, 18)
    ]
    of = {(r["encoder"], r["films"], r["seed"]): r["value"] for r in found
          if r["metric"] == "dice" and r["class"] == "macro" and not isinstance(r["seed"], list)}
    for row in means:
        both = [of[row["encoder"], row["films"], seed] for seed in (0, 1)]
        assert row["value"] == pytest.approx(np.mean(both)) and row["std"] == pytest.approx(np.std(both, ddof=1))
    assert of["none", 4, 0] != of["none", 4, 1]
    curve = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [row["films"] for row in curve] == sorted((row["films"] for row in curve), key=int)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("films_*/rows.json")}
    (tmp_path / "results.json").unlink()
    assert start(given, tmp_path) == found
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_best_state_counts_not_the_last(tmp_path, monkeypatch):
    """Validation losses as given: the second of four is the lowest, and its state is what is judged."""
    states, told = [], iter([0.9, 0.1, 0.5, 0.7])

    def validation(validate, variables, *_):
        states.append(jax.tree.map(np.asarray, variables))
        return next(told)

    monkeypatch.setattr(fit, "_validation", validation)
    given = config(epochs=4, eval_every=3)  # 18 films in batches of 8: three steps an epoch
    start(given, tmp_path)
    best = predict.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, best, states[1])
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, best, states[3])


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower config.lr"):
        start(config(lr=1e38), tmp_path)


@pytest.mark.parametrize("fields, message", [
    (dict(head="segformer"), "head='segformer' must be one of linear, vitdet, upernet, unet, effunet"),
    (dict(dataset=""), "dataset is empty: lungs, zones"),
    (dict(fit="squeeze"), "fit='squeeze' must be one of crop, pad, stretch"),
    (dict(head="linear", encoder=""), "encoder is empty"),
    (dict(epochs=0), "batch_size and epochs must be at least 1"),
    (dict(shots=(-1,)), "shots are numbers of films"),
    (dict(strata=("ethnicity",)), "strata: no column ethnicity; there are effusion, "),
])  # fmt: skip
def test_configs_that_cannot_run_are_refused(fields, message, tmp_path):
    with pytest.raises(CaseError, match=message):
        start(config(**fields), tmp_path)


def test_films_are_flipped_only_where_structures_have_no_sides():
    given = config(structures=("effusion",))
    assert segment.Task.open(given).config.deformation.flip == 0.5
    for structures in (("right lung",), ("left rib 3", "effusion")):
        assert segment.Task.open(config(structures=structures)).config.deformation.flip == 0.0
    assert all(map(segment.SIDED.search, ("R1", "L10", "right upper lung zone")))
    assert not any(map(segment.SIDED.search, ("lungs", "pneumothorax", "chest tube", "Rib", "copyright")))


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """Predictions of films in a folder, by a head without training."""
    given, workdir = config(), tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(given.to_json())
    (workdir / "structures.json").write_text(json.dumps({"right lung": 1, "left lung": 2}))
    variables = heads.build(given, 2).init(jax.random.key(0))
    monkeypatch.setattr(predict, "load", lambda part: variables)
    rng = np.random.default_rng(0)

    def films(*names):
        for name in names:
            (tmp_path / "films" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 36), np.uint8)).save(tmp_path / "films" / name)

    def run(**fields):
        asked = predict_config.get_config()
        asked.update({"images": str(tmp_path / "films"), "out": str(tmp_path / "out")} | fields)
        predict.run(asked, workdir)
        masks = (tmp_path / "out" / "masks").rglob("*.png")
        return sorted(path.relative_to(tmp_path / "out" / "masks").as_posix() for path in masks)

    return SimpleNamespace(films=films, run=run)


def test_predictions_keep_the_folders_of_their_films(untrained, tmp_path):
    untrained.films("a/b.png", "a-b.png", "x.png")
    (tmp_path / "films" / "a" / 'one, "two".png').write_text("<html>")
    assert untrained.run() == ["a-b.png", "a/b.png", "x.png"]
    assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 3
    with (tmp_path / "out" / "rejects.csv").open(newline="") as file:
        (reject,) = csv.DictReader(file)
    assert reject["file"] == 'a/one, "two".png' and "HTML" in reject["reason"]
    assert untrained.run(separate=True, out=str(tmp_path / "apart")) and sorted(
        path.name for path in (tmp_path / "apart" / "masks" / "a").iterdir()
    ) == ["b-left_lung.png", "b-right_lung.png"]


def test_films_whose_masks_would_overwrite_each_other_are_refused(untrained, tmp_path):
    untrained.films("p/x.png", "p/x.jpg", "x.png")
    with pytest.raises(CaseError, match=r"p/x.jpg and p/x.png .*p/x.png"):
        untrained.run()
    assert not (tmp_path / "out").exists()


def test_predictions_need_a_folder(untrained, tmp_path, monkeypatch):
    untrained.films("x.png")
    monkeypatch.chdir(tmp_path / "films")  # an empty path is the working directory
    with pytest.raises(CaseError, match="images is empty"):
        untrained.run(images="")


def test_predictions_need_a_run_of_this_task(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "pretrain"}))
    with pytest.raises(CaseError, match="is no run of task=segment, but of task='pretrain'"):
        predict.run(predict_config.get_config(), tmp_path)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    """kill -9 in a real process, twice: losses and rows of the resumed run are those of one that was left alone."""
    arguments = [
        "--config=configs/segment.py:small,head=unet,dataset=synthetic", "--config.data.films=24",
        "--config.data.image_size=48", f"--config.image_size={SIZE}", "--config.unet.filters=(4,8)",
        "--config.epochs=40", "--config.checkpoint_every=10", "--config.log_every=1", "--config.overlays=0",
    ]
    command = [sys.executable, "-m", "raddino_jax.main", *arguments]

    def run(workdir, kill_at=0):
        process = subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while kill_at and process.poll() is None:
            steps = [row["step"] for row in logs.read_metrics(workdir)]
            if steps and steps[-1] >= kill_at and list((workdir / "checkpoints").glob("[1-9]*")):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        said = process.communicate()[1]
        assert process.returncode == (-signal.SIGKILL if kill_at else 0), said
        return said

    run(tmp_path / "whole")
    run(tmp_path / "killed", kill_at=15)
    run(tmp_path / "killed", kill_at=35)
    assert "resumed from step" in run(tmp_path / "killed")
    whole, killed = (
        [(row["step"], row["loss"], row.get("val_loss")) for row in logs.read_metrics(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert whole == killed and len(whole) == 120
    rows = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert rows[0] == rows[1]
