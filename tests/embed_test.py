"""Features of many films: one row per readable file, in order, as of the film alone, and no loss when interrupted."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from raddino_jax import embed, encoders
from raddino_jax import params as trees
from raddino_jax.conversion import files, formats, huggingface
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.data import images
from raddino_jax.models.vit import ViT

ROOT = Path(__file__).resolve().parent.parent
FIELDS = dict(width=32, depth=1, heads=2, patch_size=8, image_size=32, registers=0, ffn="mlp", layerscale=1.0)


def random_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = trees.flatten(encoders.expected_params(ViT(**FIELDS), 32))
    return {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in shapes.items()}


def tiny(seed: int = 0) -> encoders.Encoder:
    return encoders.Encoder(
        "tiny", ViT(**FIELDS), trees.unflatten(random_arrays(seed)), Preprocess(32, 32, (0.5,), (0.25,))
    )


@pytest.fixture(scope="module")
def encoder() -> encoders.Encoder:
    return tiny()


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, rng.integers(35, 60, 2), np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eleven films in two folders, and three files that are none."""
    root = tmp_path / "films"
    (root / "b").mkdir(parents=True)
    for i in range(11):
        Image.fromarray(picture(i)).save(
            root / ("b" if i % 3 == 1 else "") / f"film{i:02}.{'png' if i % 2 else 'jpg'}"
        )
    (root / "b" / "notes.csv").write_text("a,b\n1,2\n")
    (root / "a page.jpg").write_text("<html>not found</html>")
    whole = (root / "film02.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def alone(encoder, path: Path) -> dict:
    return {name: np.asarray(v)[0] for name, v in encoder(encoder.preprocess([images.read(path)])).items()}


def check(encoder, root: Path, table: dict, patches: str = "") -> None:
    """Rows are the readable files in order of name; each equals its film alone; the others are rejected."""
    everything = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    rejected = {row["id"] for row in table["rejects"]}
    assert list(table["id"]) == [name for name in everything if name not in rejected]
    for i, name in enumerate(table["id"]):
        expected = alone(encoder, root / name)
        np.testing.assert_allclose(table["cls"][i], expected["cls"], rtol=1e-5, atol=1e-5)
        if patches:
            whole = expected["patches"] if patches == "full" else expected["patches"].mean((0, 1))
            np.testing.assert_allclose(table["patches"][i], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("patches", ["", "mean", "full"])
def test_a_folder(encoder, folder, tmp_path, suffix, patches):
    out = tmp_path / f"out.{suffix}"
    table = embed.embed(encoder, folder, out, patches=patches, batch_size=4)
    assert len(table["id"]) == 11 and {row["id"] for row in table["rejects"]} == {
        "a page.jpg",
        "cut.jpg",
        "b/notes.csv",
    }
    check(encoder, folder, table, patches)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["films", out.name, "rejects.csv", *(["out.patches.npy"] if patches == "full" else [])]
    )
    with (tmp_path / "rejects.csv").open(newline="") as file:
        reasons = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons == {"a page.jpg": "NotAnImage", "b/notes.csv": "NotAnImage", "cut.jpg": "Truncated"}
    if suffix == "npz":
        raw = np.load(out, allow_pickle=False)
        np.testing.assert_array_equal(raw["cls"], table["cls"])
        assert raw["cls"].dtype == np.float32 and raw["cls"].shape == (11, 32)
    else:
        raw = parquet.read_table(out)
        assert raw["id"].to_pylist() == list(table["id"]) and len(raw["cls"][0]) == 32
    if patches == "full":
        maps = np.load(tmp_path / "out.patches.npy", mmap_mode="r")
        assert isinstance(maps, np.memmap) and maps.shape == (11, 4, 4, 32)


def test_in_a_notebook(encoder, folder):
    before = set(folder.parent.iterdir())
    table = embed.embed(encoder, folder, patches="full", batch_size=3)
    check(encoder, folder, table, "full")
    assert set(folder.parent.iterdir()) == before


def test_output_inside_the_folder_of_films(encoder, folder):
    first = embed.embed(encoder, folder, folder / "out.npz", batch_size=4)
    assert "out.npz" not in first["id"] and len(first["rejects"]) == 3
    again = embed.embed(encoder, folder, folder / "out.npz", batch_size=4)
    assert again["done_before"] == 14 and len(again["rejects"]) == 3
    np.testing.assert_array_equal(first["cls"], again["cls"])


# --- interrupted ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run at a given place, as a signal would."""


def killed_at(monkeypatch, place: str, time_: int) -> None:
    """The `time_`-th write ends the run: before its numbers, between them and the progress line, or inside that."""
    calls = {"n": 0}
    append, whole = embed.Work.append, embed._append

    def broken_append(self, batch, arrays):
        calls["n"] += 1
        if calls["n"] < time_:
            return append(self, batch, arrays)
        if place != "before":
            for name, value in arrays.items():
                whole(self.folder / f"{name}.npy", len(self.ids), value)
        if place == "inside":
            self.progress.write('{"seen": 9, "ids": ["fi')
            self.progress.flush()
        raise Killed

    monkeypatch.setattr(embed.Work, "append", broken_append)


@pytest.mark.parametrize("time_", [1, 3])
@pytest.mark.parametrize("place", ["before", "between", "inside"])
def test_interrupted_and_resumed(encoder, folder, tmp_path, monkeypatch, place, time_):
    whole = embed.embed(encoder, folder, tmp_path / "whole.npz", patches="full", batch_size=2)
    out = tmp_path / "out.npz"
    with monkeypatch.context() as patch:
        killed_at(patch, place, time_)
        with pytest.raises(Killed):
            embed.embed(encoder, folder, out, patches="full", batch_size=2)
    assert not out.exists() and (tmp_path / ".out.npz.unfinished").is_dir()
    again = embed.embed(encoder, folder, out, patches="full", batch_size=2)
    assert (again["done_before"] > 0) == (time_ > 1)
    for name in ("id", "cls", "patches"):
        np.testing.assert_array_equal(again[name], whole[name], err_msg=name)
    assert again["rejects"] == whole["rejects"]
    assert not (tmp_path / ".out.npz.unfinished").exists()


def test_killed_between_the_last_files(encoder, folder, tmp_path, monkeypatch):
    """The patch features have their name already, the rows not yet."""
    whole = embed.embed(encoder, folder, tmp_path / "whole.npz", patches="full", batch_size=4)
    replace, out = os.replace, tmp_path / "out.npz"

    def killed(source, target):
        if Path(target) == out:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            embed.embed(encoder, folder, out, patches="full", batch_size=4)
    assert (tmp_path / "out.patches.npy").exists() and not out.exists()
    again = embed.embed(encoder, folder, out, patches="full", batch_size=4)
    for name in ("id", "cls", "patches"):
        np.testing.assert_array_equal(again[name], whole[name], err_msg=name)


def test_a_batch_of_nothing_but_rejects(encoder, tmp_path):
    """At the end, after rows: it must not cost them."""
    root = tmp_path / "films"
    root.mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(root / f"film{i}.png")
    (root / "zzz.png").write_text("no film")
    table = embed.embed(encoder, root, tmp_path / "out.npz", batch_size=3, patches="full")
    check(encoder, root, table, "full")
    assert len(table["id"]) == 3 and len(table["rejects"]) == 1


@pytest.mark.parametrize("change", [dict(patches="mean"), dict(mode="percentile"), "film", "weights"])
def test_work_of_another_command_is_refused(encoder, folder, tmp_path, monkeypatch, change):
    out, options = tmp_path / "out.npz", dict(batch_size=2)
    with monkeypatch.context() as patch:
        killed_at(patch, "before", 3)
        with pytest.raises(Killed):
            embed.embed(encoder, folder, out, **options)
    if change == "film":
        Image.fromarray(picture(0)).save(folder / "another.png")
    elif change == "weights":
        encoder = tiny(seed=1)
    with pytest.raises(embed.EmbedError, match="is from another command"):
        embed.embed(encoder, folder, out, **options | (change if isinstance(change, dict) else {}))


def test_a_finished_file_is_kept(encoder, folder, tmp_path):
    out = tmp_path / "out.npz"
    embed.embed(encoder, folder, out, batch_size=4)
    before = out.read_bytes()
    assert embed.embed(encoder, folder, out, batch_size=8)["done_before"] == 14
    with pytest.raises(embed.EmbedError, match="patches:  -> mean"):
        embed.embed(encoder, folder, out, patches="mean")
    (tmp_path / "mine.npz").write_bytes(b"something of mine")
    with pytest.raises(embed.EmbedError, match="not from this command"):
        embed.embed(encoder, folder, tmp_path / "mine.npz")
    assert out.read_bytes() == before and (tmp_path / "mine.npz").read_bytes() == b"something of mine"


def test_two_outputs_in_one_folder(encoder, folder, tmp_path):
    """The second writes its own rejects.csv; the first still knows what it left out."""
    first = embed.embed(encoder, folder, tmp_path / "a.parquet", batch_size=4)
    assert embed.embed(encoder, folder / "film02.jpg", tmp_path / "b.npz", batch_size=4)["rejects"] == []
    again = embed.embed(encoder, folder, tmp_path / "a.parquet", batch_size=4)
    assert len(again["rejects"]) == 3 and again["rejects"] == first["rejects"]


# --- lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, column",
    [
        ("list.csv", "patient,path\n1,film02.jpg\n2,b/film01.png\n", ""),
        ("list.csv", "\ufefffile,where\nx,film02.jpg\ny,b/film01.png\n", "where"),
        ("list.txt", "film02.jpg\n\nb/film01.png\n", ""),
    ],
)
def test_lists(encoder, folder, name, text, column):
    """Rows in the order of the list, named as the list names them, paths from where it lies."""
    (folder / name).write_text(text, encoding="utf-8")
    table = embed.embed(encoder, folder / name, column=column)
    assert list(table["id"]) == ["film02.jpg", "b/film01.png"]
    np.testing.assert_allclose(
        table["cls"][1], alone(encoder, folder / "b/film01.png")["cls"], rtol=1e-5, atol=1e-5
    )


def test_a_listed_file_that_is_not_there_is_a_reject(encoder, folder):
    (folder / "list.txt").write_text("film02.jpg\ngone.png\n")
    table = embed.embed(encoder, folder / "list.txt")
    assert list(table["id"]) == ["film02.jpg"] and table["rejects"][0]["reason"] == "Unreadable"


def test_one_film(encoder, folder):
    assert list(embed.embed(encoder, folder / "film02.jpg")["id"]) == ["film02.jpg"]


def test_lists_that_are_refused(encoder, folder, tmp_path):
    (folder / "list.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    for source, options, said in [
        (folder / "list.csv", {}, "no column"),
        (folder / "list.csv", dict(column="c"), "no column named c.*\\(a, b\\)"),
        (tmp_path / "gone", {}, "is not there"),
        (tmp_path / "empty", {}, "holds no files"),
        (folder, dict(out=tmp_path / "x.csv"), "ends in .npz or .parquet"),
        (folder, dict(patches="all"), "patches is one of"),
        (folder, dict(mode="loud"), "mode one of"),
        (folder, dict(batch_size=0), "batch_size"),
    ]:
        with pytest.raises(embed.EmbedError, match=said):
            embed.embed(encoder, source, **options)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A Hugging Face folder with a small network."""
    path = tmp_path_factory.mktemp("encoder")
    files.write(path / "model.safetensors", formats.write("hf_dinov2", random_arrays(), "test"))
    (path / "config.json").write_text(json.dumps(huggingface.write_config(FIELDS, "float32")))
    settings = huggingface.write_preprocess(Preprocess(32, 32, (0.5307,), (0.2583,)))
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "raddino_jax.embed", *arguments]


ONE_DEVICE = os.environ | {"XLA_FLAGS": ""}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, env=ONE_DEVICE)


def test_the_command_over_dicom_files(weights, cxr, tmp_path):
    """One row per readable file, the list beside them rejected; last on stdout one JSON object with the rate."""
    out = tmp_path / "out.npz"
    done = run(
        f"--encoder={weights}",
        f"--images={cxr / 'dicom'}",
        f"--out={out}",
        "--batch_size=4",
        "--dtype=bfloat16",
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    everything = [p for p in (cxr / "dicom").rglob("*") if p.is_file()]
    assert said["rows"] + said["rejected"] == len(everything) and said["images_per_second"] > 0
    assert said["rows"] == sum(map(images.is_candidate, everything)) > 0
    assert "film/s" in done.stderr
    encoder, table = encoders.load(str(weights)), np.load(out)
    expected = np.stack([alone(encoder, cxr / "dicom" / name)["cls"] for name in table["id"]])
    assert np.abs(table["cls"] - expected).max() <= 2e-2 * np.abs(expected).max()


def test_interrupted_by_hand(weights, folder, tmp_path, capsys, monkeypatch):
    """Ctrl-C ends in a sentence, not in a traceback."""
    arguments = [f"--encoder={weights}", f"--images={folder}", f"--out={tmp_path / 'out.npz'}", "--batch_size=4"]
    with monkeypatch.context() as patch:
        patch.setattr(embed, "_features", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert embed.main(arguments) == 130
    assert "the same command continues" in capsys.readouterr().err and not (tmp_path / "out.npz").exists()
    assert embed.main(arguments) == 0


@pytest.mark.slow
def test_the_command_over_all_films_killed_and_resumed(weights, cxr, tmp_path):
    arguments = [f"--encoder={weights}", f"--images={cxr / 'images'}", "--batch_size=8", "--patches=mean"]
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    assert run(*arguments, f"--out={whole}").returncode == 0
    process = subprocess.Popen(
        command(*arguments, f"--out={out}"), cwd=ROOT, stderr=subprocess.DEVNULL, env=ONE_DEVICE
    )
    progress = tmp_path / ".out.parquet.unfinished" / "progress.jsonl"
    while not (progress.exists() and progress.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = run(*arguments, f"--out={out}")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["rows"] == len(list((cxr / "images").iterdir()))
    first, second = parquet.read_table(whole), parquet.read_table(out)
    assert first.equals(second)


def test_the_command_refuses(weights, folder, tmp_path, capsys):
    out = f"--out={tmp_path / 'out.npz'}"
    for arguments, said in [
        (["--encoder=resnet"], "neither an encoder"),
        (["--encoder=mrm"], "not on the Hugging Face Hub"),
        ([f"--encoder={weights}", "--weights=gone.pth"], "gone.pth"),
    ]:
        assert embed.main([*arguments, f"--images={folder}", out]) == 2
        assert said in capsys.readouterr().err


def test_nothing_readable(weights, tmp_path, capsys):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "page.png").write_text("<html>")
    arguments = [f"--encoder={weights}", f"--images={tmp_path / 'films'}", f"--out={tmp_path / 'out.npz'}"]
    assert embed.main(arguments) == 1
    assert "none of 1 files" in capsys.readouterr().err
    assert (
        not (tmp_path / "out.npz").exists() and "page.png,NotAnImage" in (tmp_path / "rejects.csv").read_text()
    )
