"""Preparing a private folder: pixels, labels, splits and names, resuming after kill -9, and what is never written."""

import csv
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_trees import SECRET, SIZE, dicom, drawn, twelve_bits
from ml_collections import ConfigDict
from PIL import Image

from raddino_jax import prepare
from raddino_jax.data import labels, pipeline, store
from raddino_jax.data.datasets.manifest import ManifestError


@pytest.fixture
def archive(tmp_path) -> Path:
    """Twelve films of six patients in three formats, a broken one, a copy, and what is no film."""
    raw = tmp_path / "archive"
    for index in range(12):
        patient, grey = f"Doe-{index // 2}", drawn(index)
        path = raw / patient / f"film {index}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index % 3 == 0:
            dicom(path, 4095 - twelve_bits(grey), "MONOCHROME1", bits=12)
        elif index % 3 == 1:
            Image.fromarray(grey).save(path.with_suffix(".png"))
        else:
            Image.fromarray(grey.astype(np.uint16) * 257).save(path.with_suffix(".dcm"), "PNG")
    shutil.copy(raw / "Doe-0" / "film 1.png", raw / "Doe-3" / "copy.png")
    (raw / "Doe-5" / "cut.png").write_bytes((raw / "Doe-0" / "film 1.png").read_bytes()[:200])
    (raw / "notes.txt").write_text(SECRET)
    return raw


def table(raw: Path) -> Path:
    path = raw.parent / "films.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "subject_id", "view", "split", "sex", "age", "Edema", "Mass", "name"])
        for index in range(12):
            split = ["train", "train", "train", "train", "val", "test"][index // 2]
            edema, mass = index % 2, ["", "-1", "0.0", "1"][index % 4]
            view = "LL" if index % 2 else "AP"
            writer.writerow([f"film {index}", f"Doe-{index // 2}", view, split, "Female", "061Y", edema, mass, SECRET])
    return path


def run(raw, data, **more) -> dict:
    return prepare.prepare("folder", str(raw), str(data), **(dict(size=SIZE, workers=1) | more))


def films(data: Path, name: str = "folder") -> tuple[list[dict], list[np.ndarray]]:
    """Rows of the table and the pixels of the records, read by TFDS itself."""
    import tensorflow_datasets as tfds

    folder = data / name / store.VERSION
    rows = pq.read_table(folder / "films.parquet").to_pylist()
    builder = tfds.builder_from_directory(folder)
    records = [record for split in sorted(builder.info.splits) for record in builder.as_data_source(split)]
    assert [record["id"].decode() for record in records] == [row["id"] for row in rows]
    return rows, records


def test_every_film_comes_back_as_it_was_drawn(archive, tmp_path):
    summary = run(archive, tmp_path / "data")
    rows, records = films(tmp_path / "data")
    assert summary["films"] == len(rows) == 13 and summary["pretrain"] == 13
    found = sorted(record["image"][..., 0].tobytes() for record in records)
    assert found == sorted(drawn(index).tobytes() for index in [*range(12), 1])
    assert all((row["height"], row["width"]) == (SIZE, 40) for row in rows)
    pixels = np.stack([record["image"] for record in records]) / 255
    np.testing.assert_allclose([summary["mean"], summary["std"]], [pixels.mean(), pixels.std()], atol=1e-6)
    assert summary["duplicates"]["groups"] == 1 and summary["duplicates"]["films"] == 2
    with open(tmp_path / "data/folder/rejects.csv", newline="") as file:
        rejects = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert set(rejects) == {"notes.txt", "Doe-5/cut.png"}
    assert "cut off" in rejects["Doe-5/cut.png"] or "at least" in rejects["Doe-5/cut.png"]


def test_the_table_gives_labels_views_splits_and_patients(archive, tmp_path):
    run(archive, tmp_path / "data", csv=str(table(archive)), labels="Edema,Mass")
    rows, records = films(tmp_path / "data")
    by_pixels = {record["image"].tobytes(): (row, record) for row, record in zip(rows, records, strict=True)}
    assert len(by_pixels) == 12  # the copy is not in the table
    names = {}
    for index in range(12):
        row, record = by_pixels[drawn(index).tobytes()]
        mass = [np.nan, -1, 0, 1][index % 4]
        np.testing.assert_array_equal(record["labels"], np.array([index % 2, mass], np.float32))
        np.testing.assert_array_equal([row["Edema"], row["Mass"]], [index % 2, mass])
        assert row["split"] == ["train", "train", "train", "train", "val", "test"][index // 2]
        assert row["view"] == ["frontal", "lateral"][index % 2] and (row["sex"], row["age"]) == ("F", 61)
        assert row["pretrain"] == (row["split"] == "train")
        names.setdefault(index // 2, set()).add(row["patient"])
    assert len(set.union(*names.values())) == 6 and all(len(found) == 1 for found in names.values())


def test_nothing_beyond_the_whitelist_gets_out(archive, tmp_path):
    """Names, numbers, paths and dates of the archive are in no file of the result; rejects.csv stays outside it."""
    run(archive, tmp_path / "data", csv=str(table(archive)), labels="Edema")
    home = tmp_path / "data/folder"
    assert sorted(path.name for path in home.iterdir()) == ["1.0.0", "rejects.csv", "summary.json"]
    for path in [*(home / "1.0.0").iterdir(), home / "summary.json"]:
        data = path.read_bytes()
        for secret in (SECRET, "Doe", "4711", "film 1", "archive", "20200102", "subject_id", str(tmp_path)):
            assert secret.encode() not in data, (path.name, secret)


@pytest.mark.parametrize("workers", [1, 2])
def test_splits_drawn_by_patient_are_the_same_every_time(archive, tmp_path, workers):
    run(archive, tmp_path / "data", workers=workers, patient_regex=r"Doe-\d", val=0.3, test=0.3, shard_mib=0.003)
    rows, _ = films(tmp_path / "data")
    split = {}
    for row in rows:
        assert split.setdefault(row["patient"], row["split"]) == row["split"]
    assert set(split.values()) > {"train"} and len(split) == 6


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(name="Bad Name"), "lower-case"),
        (dict(vote="any"), "no option --vote; it has --csv"),
        (dict(labels="Edema"), "give --csv"),
        (dict(encoding="png"), "--encoding of raw, zstd"),
        (dict(patient_regex="x(y)"), "does not match"),
        (dict(patient_regex="x(y"), "no regular expression"),
        (dict(exclude="/nowhere"), "No such file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(archive, tmp_path, options, reason):
    with pytest.raises((ManifestError, OSError), match=reason):
        run(archive, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_a_table_that_tears_a_patient_apart_is_refused(archive, tmp_path):
    path = table(archive)
    path.write_text(path.read_text().replace("film 0,Doe-0,AP,train", "film 0,Doe-0,AP,test"))
    with pytest.raises(ManifestError, match="one patient"):
        run(archive, tmp_path / "data", csv=str(path))


def test_a_table_with_an_unknown_label_or_a_missing_film(archive, tmp_path):
    path = table(archive)
    text = path.read_text()
    path.write_text(text.replace("061Y,0,,", "061Y,maybe,,", 1))
    with pytest.raises(ManifestError, match="'maybe'"):
        run(archive, tmp_path / "data", csv=str(path), labels="Edema")
    path.write_text(text.replace("film 3,", "film 99,"))
    assert run(archive, tmp_path / "data", csv=str(path))["films"] == 11
    assert "film 99,\"named in the table" in (tmp_path / "data/folder/rejects.csv").read_text() or (
        "film 99,named in the table" in (tmp_path / "data/folder/rejects.csv").read_text().replace('"', "")
    )


def test_excluded_patients_are_left_out(archive, tmp_path):
    listed = tmp_path / "held_out.txt"
    listed.write_text("Doe-1\nDoe-2\n")
    summary = run(archive, tmp_path / "data", patient_regex=r"Doe-\d", exclude=str(listed))
    assert summary["films"] == 13 - 4 and summary["left_out"] == {"listed in held_out.txt": 4}


def test_a_dry_run_writes_nothing(archive, tmp_path):
    summary = run(archive, tmp_path / "data", dry_run=True)
    assert summary["films"] == 14 and sum(summary["rejects"].values()) == 2  # the cut film and the notes
    assert not (tmp_path / "data").exists()


def test_the_same_command_again_says_so_and_another_is_refused(archive, tmp_path):
    first = run(archive, tmp_path / "data")
    before = contents(tmp_path / "data")
    assert run(archive, tmp_path / "data") == first
    assert contents(tmp_path / "data") == before
    with pytest.raises(ManifestError, match="other settings: give another --name"):
        run(archive, tmp_path / "data", size=24)
    assert contents(tmp_path / "data") == before


def test_two_at_once_are_refused(archive, tmp_path):
    home = tmp_path / "data/folder"
    home.mkdir(parents=True)
    with open(home / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ManifestError, match="another process"):
            run(archive, tmp_path / "data")


# --- interruptions ----------------------------------------------------------------------------------------


def command(raw: Path, data: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "raddino_jax.prepare", "--dataset=folder", f"--raw_dir={raw}", f"--data_dir={data}",
            "--size=64", "--shard_mib=0.05", *more]  # fmt: skip


SILENT = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def many(raw: Path, count: int, side: int = 600) -> Path:
    raw.mkdir()
    for index in range(count):
        Image.fromarray(drawn(index, side, side + 50)).save(raw / f"{index}.png", compress_level=1)
    return raw


def killed_and_resumed(raw: Path, data: Path, moments: list[float]) -> int:
    """Start, kill -9 the process after each of the moments (seconds), then let it end; shards kept on the way."""
    kept = 0
    for moment in moments:
        process = subprocess.Popen(command(raw, data, "--workers=2"), **SILENT)
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = max(kept, len(list((data / "folder/work/done").glob("folder-*"))))
    subprocess.run(command(raw, data, "--workers=2"), check=True, capture_output=True)
    return kept


def test_killed_while_writing_and_resumed_gives_the_same_bytes(tmp_path):
    raw = many(tmp_path / "raw", 160)
    subprocess.run(command(raw, tmp_path / "whole", "--workers=1"), check=True, capture_output=True)
    whole = contents(tmp_path / "whole")
    data, home = tmp_path / "torn", tmp_path / "torn/folder"
    running = Path("/proc").is_dir()
    process = subprocess.Popen(command(raw, data, "--workers=2"), **SILENT)
    while len(list((home / "work/done").glob("folder-*"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if running else []
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ends = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < ends, "a worker outlived its parent"
        time.sleep(0.1)
    done = [path.name for path in (home / "work/done").glob("folder-*")]
    done = {name: (home / "1.0.0" / name).stat().st_mtime_ns for name in done}
    again = subprocess.run(command(raw, data, "--workers=2"), check=True, capture_output=True, text=True)
    assert "going on:" in again.stderr
    assert all((home / "1.0.0" / name).stat().st_mtime_ns == when for name, when in done.items()), "done twice"
    assert contents(data) == whole


@pytest.mark.slow
def test_killed_at_ten_random_moments_gives_the_same_bytes(tmp_path):
    raw = many(tmp_path / "raw", 600, side=900)
    began = time.monotonic()
    subprocess.run(command(raw, tmp_path / "whole", "--workers=2"), check=True, capture_output=True)
    lasted = time.monotonic() - began
    moments = [random.Random(0).uniform(0.2, 0.4) * lasted for _ in range(10)]
    kept = killed_and_resumed(raw, tmp_path / "torn", moments)
    assert kept > 0
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


@pytest.mark.parametrize("point", ["films.parquet", "metadata.json", "dataset_info.json", "cleared"])
def test_killed_at_the_end_and_resumed_gives_the_same_bytes(archive, tmp_path, monkeypatch, point):
    """Stopped right before one of the last files gets its name, or before the plan is removed."""
    run(archive, tmp_path / "whole")
    rename, rmtree = Path.rename, shutil.rmtree

    def stopping(self, target):
        if Path(target).name == point:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopping)
    if point == "cleared":
        monkeypatch.setattr(prepare.shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(KeyboardInterrupt)
                            if Path(path).name == "work" else rmtree(path, **_))  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(archive, tmp_path / "torn")
    monkeypatch.undo()
    assert (tmp_path / "torn/folder/work").exists()
    assert store.is_prepared(str(tmp_path / "torn"), "folder") == (point == "cleared")
    run(archive, tmp_path / "torn")
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_other_films_under_a_begun_plan_are_refused(archive, tmp_path):
    run(archive, tmp_path / "data")
    home = tmp_path / "data/folder"
    (home / "1.0.0/dataset_info.json").unlink()
    (home / "work").mkdir()
    (home / "work/plan.json").write_text(json.dumps({"plan": "another"}))
    with pytest.raises(ManifestError, match="was begun from other files"):
        run(archive, tmp_path / "data")


def test_a_full_disk_ends_with_a_sentence_and_no_half_file(tmp_path):
    raw = many(tmp_path / "raw", 120, side=100)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))

    process = subprocess.run(command(raw, tmp_path / "data", "--workers=1", "--shard_mib=128"), capture_output=True,
                             text=True, preexec_fn=limit)  # fmt: skip
    assert process.returncode != 0
    target = tmp_path / "data/folder/1.0.0"
    assert not (target / "dataset_info.json").exists() and not list(target.glob("folder-*"))
    assert "Traceback" not in process.stderr, process.stderr
    subprocess.run(command(raw, tmp_path / "data", "--workers=1", "--shard_mib=128"), check=True, capture_output=True)


# --- reading ----------------------------------------------------------------------------------------------


def config(data_dir: Path, *sources: str, **more) -> ConfigDict:
    base = dict(
        sources=sources, weights=(), data_dir=str(data_dir), image_size=SIZE, window="centre", synthetic_size=6,
        threads=2, prefetch=2, cache_gib=0.0, fraction=1.0, subset="",
    )  # fmt: skip
    return ConfigDict(base | more)


def test_pre_training_reads_a_prepared_set_by_name(archive, tmp_path):
    run(archive, tmp_path, name="ours", csv=str(table(archive)), labels="Edema,Mass", shard_mib=0.003)
    (source,) = pipeline.open_sources(config(tmp_path, "ours"))
    assert source.kind == "real" and len(source) == 8  # the training split
    found = sorted(source.film(i).tobytes() for i in range(8))
    assert found == sorted(drawn(index).tobytes() for index in range(8))
    (frontal,) = pipeline.open_sources(config(tmp_path, "ours:frontal"))
    assert sorted(frontal.film(i).tobytes() for i in range(4)) == sorted(drawn(i).tobytes() for i in range(0, 8, 2))
    masks = pipeline.MaskSpec(group_size=2, image_size=SIZE, patch_size=8, probability=0.5, ratio=(0.1, 0.5))
    batch = next(pipeline.batches(config(tmp_path, "ours"), rows=pipeline.Rows(0, 4, 4), steps=1, start=0, seed=0,
                                  masks=masks))  # fmt: skip
    assert batch["images"].shape == (4, SIZE, SIZE)
    centre = {drawn(i)[:, 4:36].tobytes() for i in range(8)}
    assert all(image.tobytes() in centre for image in batch["images"])


def test_the_online_evaluation_sees_labels_and_held_out_films_first(archive, tmp_path):
    run(archive, tmp_path, name="ours", csv=str(table(archive)), labels="Edema,Mass")
    spec = ConfigDict(dict(films=100, csv="", columns=(), where="", file_column="file", patient_column="patient_id"))
    squares, found, kind = pipeline.labelled_films(config(tmp_path, "ours"), spec)
    assert kind == "real" and found.names == ("Edema", "Mass") and len(squares) == 12
    index = {drawn(i)[:, 4:36].tobytes(): i for i in range(12)}
    order = [index[film.tobytes()] for film in squares]
    np.testing.assert_array_equal(found.values[:, 0], [i % 2 for i in order])
    np.testing.assert_array_equal(found.values[:, 1], [[np.nan, np.nan, 0, 1][i % 4] for i in order])
    assert set(order[:4]) == {8, 9, 10, 11}
    assert len(set(found.patients)) == 6
    spec.where, spec.columns = "split=val", ("Edema",)
    assert {index[film.tobytes()] for film in pipeline.labelled_films(config(tmp_path, "ours"), spec)[0]} == {8, 9}
    spec.columns = ("Fracture",)
    with pytest.raises(labels.LabelError, match="no column 'Fracture'"):
        pipeline.labelled_films(config(tmp_path, "ours"), spec)


def test_a_subset_by_a_list_of_ids(archive, tmp_path):
    run(archive, tmp_path, name="ours")
    rows, _ = films(tmp_path, "ours")
    listed = tmp_path / "images.csv"
    listed.write_text("dataset,image\n" + "".join(f"ours,files/{row['id']}.png\n" for row in rows[:5]))
    (source,) = pipeline.open_sources(config(tmp_path, "ours", subset=str(listed)))
    # The two copies have one id, that of their pixels.
    assert set(source.ids()) == {row["id"] for row in rows[:5]} and 5 <= len(source) <= 6
    listed.write_text("nothing\n")
    with pytest.raises(pipeline.DataError, match="lists no film of ours"):
        pipeline.open_sources(config(tmp_path, "ours", subset=str(listed)))


def test_what_is_missing_is_an_error_that_names_the_command(archive, tmp_path):
    with pytest.raises(pipeline.DataError, match="prepare --dataset=chexpert --raw_dir=DIR"):
        pipeline.open_sources(config(tmp_path, "chexpert"))
    with pytest.raises(pipeline.DataError, match="prepare --dataset=folder --name=ours"):
        pipeline.open_sources(config(tmp_path, "ours"))
    with pytest.raises(pipeline.DataError, match="prepare --dataset=folder --raw_dir=DIR"):  # not the working directory
        pipeline.open_sources(config(tmp_path, "folder"))
    run(archive, tmp_path, name="ours")
    with pytest.raises(pipeline.DataError, match="--size=64"):
        pipeline.open_sources(config(tmp_path, "ours", image_size=64))
    next((tmp_path / "ours/1.0.0").glob("*array_record*")).unlink()
    with pytest.raises(pipeline.DataError, match="is missing: copy the folder again"):
        pipeline.open_sources(config(tmp_path, "ours"))


def test_a_mix_is_its_members_in_the_papers_proportion(archive, tmp_path):
    with pytest.raises(pipeline.DataError, match="prepare --dataset=brax"):
        pipeline.open_sources(config(tmp_path, "multicxr"))
    for name in pipeline.MIXES["multicxr"]:
        run(archive, tmp_path, name=name)
    names, weights = pipeline.weighted(config(tmp_path, "multicxr"))
    assert [source.name for source in pipeline.open_sources(config(tmp_path, "multicxr"))] == names
    np.testing.assert_allclose(weights, np.array([41260, 223648, 210491, 112120, 160817, 90000]) / 838336)
    names, weights = pipeline.weighted(config(tmp_path, "multicxr_public", "private", weights=(3, 1)))
    assert names[-1] == "private" and weights[-1] == 1 and abs(sum(weights[:-1]) - 3) < 1e-9
    masks = pipeline.MaskSpec(group_size=2, image_size=SIZE, patch_size=8, probability=0.5, ratio=(0.1, 0.5))
    drawn_from = np.concatenate([
        batch["film"][:, 0] for batch in pipeline.batches(
            config(tmp_path, "multicxr"), rows=pipeline.Rows(0, 50, 50), steps=20, start=0, seed=0, masks=masks)
    ])  # fmt: skip
    shares = np.bincount(drawn_from, minlength=6) / 1000
    np.testing.assert_allclose(shares, np.array([41260, 223648, 210491, 112120, 160817, 90000]) / 838336, atol=0.01)


def test_zstd_gives_the_same_films(archive, tmp_path):
    run(archive, tmp_path, name="plain")
    run(archive, tmp_path, name="packed", encoding="zstd")
    plain, packed = (pipeline.open_sources(config(tmp_path, name))[0] for name in ("plain", "packed"))
    for index in range(len(plain)):
        np.testing.assert_array_equal(plain.film(index), packed.film(index))


def test_the_command_line(archive, tmp_path, capfd):
    arguments = ["--dataset=folder", f"--raw_dir={archive}", f"--data_dir={tmp_path}/data", "--size=32", "--val=0.5"]
    assert prepare.main([*arguments, r"--patient_regex=Doe-\d"]) == 0
    out = capfd.readouterr().out.strip().splitlines()
    assert json.loads(out[-1])["films"] == 13 and len(out) == 1
    assert prepare.main(["--dataset=nothing", f"--raw_dir={archive}", f"--data_dir={tmp_path}"]) == 2
    assert "must be one of folder" in capfd.readouterr().err
    assert prepare.main(["--dataset=folder", f"--raw_dir={archive}", f"--data_dir={archive}/out"]) == 2
    assert "outside the archive" in capfd.readouterr().err
