"""Every dataset from a raw tree as distributed: what comes out against what was drawn."""

import csv
import json
import math
import re

import fake_trees
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from raddino_jax import prepare
from raddino_jax.data import pipeline, store
from raddino_jax.data.datasets.manifest import ManifestError


def prepared(name: str, tree: fake_trees.Tree, data_dir, **options) -> tuple[dict, dict[str, tuple[dict, dict]]]:
    """(summary, id -> (line of the table, record as TFDS reads it))."""
    options = dict(size=tree.size, workers=1) | tree.options | options
    summary = prepare.prepare(name, str(tree.raw), str(data_dir), **options)
    folder = data_dir / options.get("name", name) / store.VERSION
    rows = pq.read_table(folder / "films.parquet").to_pylist()
    builder = tfds.builder_from_directory(folder)
    records = [record for split in sorted(builder.info.splits) for record in builder.as_data_source(split)]
    assert len(records) == len(rows) == summary["films"]
    assert [record["id"].decode() for record in records] == [row["id"] for row in rows]
    return summary, {row["id"]: (row, record) for row, record in zip(rows, records, strict=True)}


def same(found, expected) -> bool:
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(found)
    return found == pytest.approx(expected) if isinstance(expected, float) else found == expected


@pytest.mark.parametrize("name", fake_trees.TREES)
def test_what_comes_out_is_what_was_drawn(name, tmp_path):
    tree = fake_trees.TREES[name](tmp_path)
    summary, found = prepared(name, tree, tmp_path / "data")
    assert set(found) == set(tree.films)
    for film, expected in tree.films.items():
        row, record = found[film]
        pixels = record["image"][..., 0]
        assert pixels.shape == expected.pixels.shape, film
        assert np.abs(pixels.astype(int) - expected.pixels).mean() <= expected.lossy, film
        assert row["patient"] == expected.patient and row["view"] == expected.view, film
        assert row["pretrain"] == bool(record["pretrain"]) == expected.pretrain, film
        assert row["split"] == expected.split or (not expected.split and row["split"] in ("train", "val", "test"))
        for label, value in expected.labels.items():
            assert same(row[label], value), (film, label, row[label], value)
            assert same(float(record["labels"][summary["labels"].index(label)]), value), (film, label)
        for column, value in expected.more.items():
            assert same(row[column], value), (film, column, row[column], value)
        for mask, drawn in expected.masks.items():
            np.testing.assert_array_equal(record["masks"][..., summary["masks"].index(mask)], drawn, err_msg=mask)
    assert set(summary["labels"]) == set(next(iter(tree.films.values())).labels)
    assert set(summary["masks"]) == set(next(iter(tree.films.values())).masks)
    splits = {}
    for row, _ in found.values():
        assert splits.setdefault(row["patient"], row["split"]) == row["split"] or name == "mimic_cxr"


@pytest.mark.parametrize("name", fake_trees.TREES)
def test_what_is_left_out_is_reported(name, tmp_path):
    tree = fake_trees.TREES[name](tmp_path)
    summary, _ = prepared(name, tree, tmp_path / "data")
    with open(tmp_path / "data" / name / "rejects.csv", newline="") as file:
        rejects = list(csv.DictReader(file))
    assert len(rejects) == len(tree.rejects) == sum(summary["rejects"].values())
    for wanted in tree.rejects:
        assert any(wanted in row["path"] and row["reason"] for row in rejects), (wanted, rejects)
    assert {reason: n for reason, n in summary["left_out"].items() if n} == tree.left_out
    assert all(any(note in said for said in summary["notes"]) for note in tree.notes)
    for claim in summary["paper"]:
        assert claim["ours"] <= len(tree.films) + len(tree.rejects) and claim["paper"] > 40 and claim["reason"]


@pytest.mark.parametrize("name", fake_trees.TREES)
def test_no_tag_of_a_file_gets_out(name, tmp_path):
    tree = fake_trees.TREES[name](tmp_path)
    prepared(name, tree, tmp_path / "data")
    for path in (tmp_path / "data" / name / store.VERSION).iterdir():
        data = path.read_bytes()
        assert not [secret for secret in (fake_trees.SECRET, "4711", str(tmp_path)) if secret.encode() in data]


@pytest.mark.parametrize("name", fake_trees.TREES)
def test_the_wrong_folder_is_an_error_that_says_what_was_looked_for(name, tmp_path):
    tree = fake_trees.TREES[name](tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError) as error:
        prepare.prepare(name, str(tmp_path / "empty"), str(tmp_path / "data"), **tree.options)
    assert re.search(r"holds n|expected|nothing to prepare", str(error.value))
    assert not (tmp_path / "data").exists()


def test_names_are_those_of_the_pipeline():
    assert set(prepare.DATASETS) == {"folder", *pipeline.DATASETS} == {"folder", *fake_trees.TREES}
    for module in prepare.DATASETS.values():
        assert module.LICENCE and module.OBTAIN and module.__doc__


# --- options where the paper is silent ------------------------------------------------------------------------


def test_any_reader_is_enough_when_asked(tmp_path):
    tree = fake_trees.vindr_cxr(tmp_path)
    _, found = prepared("vindr_cxr", tree, tmp_path / "data", vote="any")
    for index in range(3):
        row, _ = found[f"{index:032x}"]
        assert [row[name] for name in fake_trees.VINDR] == [float((place + index) % 4 > 0) for place in range(28)]


def test_mimic_with_all_views_and_with_views_from_codes(tmp_path):
    tree = fake_trees.mimic_cxr(tmp_path)
    _, found = prepared("mimic_cxr", tree, tmp_path / "a", views="all")
    assert sum(row["pretrain"] for row, _ in found.values()) == 6  # the whole official train split
    _, found = prepared("mimic_cxr", tree, tmp_path / "b", view_codes="yes")
    assert found[fake_trees.MIMIC_ID.format(5)][0]["view"] == "frontal"
    assert sum(row["pretrain"] for row, _ in found.values()) == 3


def test_mimic_jpegs_come_with_a_warning(tmp_path):
    tree = fake_trees.mimic_cxr(tmp_path)
    for path in tree.raw.rglob("*.dcm"):
        path.unlink()
        path.with_suffix(".jpg").write_bytes(fake_trees.jpeg(fake_trees.smooth(1, 32, 40)))
    summary, found = prepared("mimic_cxr", tree, tmp_path / "data")
    assert len(found) == 8 and "equalised" in summary["notes"][0]


def test_chexpert_without_its_validation_films(tmp_path):
    tree = fake_trees.chexpert(tmp_path)
    _, found = prepared("chexpert", tree, tmp_path / "data", pretrain_on="train")
    assert {row["split"] for row, _ in found.values() if row["pretrain"]} == {"train"}


def test_padchest_as_its_files_are(tmp_path):
    tree = fake_trees.padchest(tmp_path)
    _, found = prepared("padchest", tree, tmp_path / "data", monochrome1="keep")
    name = next(name for name in tree.films if name.startswith("2168401113669640103"))
    np.testing.assert_array_equal(found[name][1]["image"][..., 0], 255 - tree.films[name].pixels)


def test_brax_from_its_pictures(tmp_path):
    tree = fake_trees.brax(tmp_path)
    table = (tree.raw / "master_spreadsheet_update.csv").read_text().splitlines()
    for index, line in enumerate(table[1:6]):
        fake_trees.png(tree.raw / line.split(",")[1], fake_trees.drawn(index))
    _, found = prepared("brax", tree, tmp_path / "data", pictures="png")
    for name, film in tree.films.items():
        np.testing.assert_array_equal(found[name][1]["image"][..., 0], film.pixels)


def test_open_i_with_reports_as_xml(tmp_path):
    tree = fake_trees.iu_xray(tmp_path, "xml")
    summary, found = prepared("iu_xray", tree, tmp_path / "data")
    for name, film in tree.films.items():
        row, _ = found[name]
        assert row["view"] == "unknown" and all(same(row[column], value) for column, value in film.more.items())
    assert "no table says" in summary["paper"][0]["reason"]


def test_an_option_with_a_wrong_value_lists_the_right_ones(tmp_path):
    tree = fake_trees.vindr_cxr(tmp_path)
    with pytest.raises(ManifestError, match="--vote=two: expected majority or any"):
        prepared("vindr_cxr", tree, tmp_path / "data", vote="two")
    tree = fake_trees.mimic_lungs(tmp_path)
    with pytest.raises(ManifestError, match="--mimic_cxr_dir=: expected the folder of MIMIC-CXR"):
        prepared("mimic_lungs", tree, tmp_path / "data", mimic_cxr_dir="")
    with pytest.raises(ManifestError, match="--lungs=WORD tells them apart"):
        prepared("mimic_lungs", tree, tmp_path / "data", lungs="images")


def test_a_mask_of_another_size_rejects_its_film(tmp_path):
    tree = fake_trees.candid_ptx(tmp_path)
    fake_trees.dicom(tree.raw / "dataset" / "1.2.1", fake_trees.drawn(1, 1024, 1000))
    summary, found = prepared("candid_ptx", tree, tmp_path / "data")
    assert set(found) == {"1.2.0", "1.2.2"}
    assert list(summary["rejects"]) == ["expected a film of # x # for this mask, found # x #"]


def test_masks_follow_a_film_that_is_made_smaller(tmp_path):
    """Nearest neighbour at half the size: every second row and column, either of two equally near ones."""
    tree = fake_trees.rsna_pneumonia(tmp_path)
    _, found = prepared("rsna_pneumonia", tree, tmp_path / "data", size=32)
    for name, film in tree.films.items():
        row, record = found[name]
        assert (row["height"], row["width"], row["original_height"]) == (32, 32, 64)
        halves = [film.masks["opacity"][y::2, x::2] for y in (0, 1) for x in (0, 1)]
        assert any(np.array_equal(record["masks"][..., 0], half) for half in halves)


def test_a_list_of_paths_selects_films_of_a_mix(tmp_path):
    from ml_collections import ConfigDict

    chexpert, nih = fake_trees.chexpert(tmp_path), fake_trees.chestx_ray14(tmp_path)
    for name, tree in (("chexpert", chexpert), ("chestx_ray14", nih)):
        prepared(name, tree, tmp_path / "data")
    listed = tmp_path / "training_images.csv"
    listed.write_text(
        "dataset,path\nCheXpert,CheXpert-v1.0/train/patient00000/study1/view1_frontal.jpg\n"
        "CheXpert,CheXpert-v1.0/train/patient00001/study2/view1_lateral.jpg\nNIH,images_001/images/00000001_000.png\n"
    )
    config = ConfigDict(dict(sources=("chexpert", "chestx_ray14"), weights=(), data_dir=str(tmp_path / "data"),
                             image_size=32, fraction=1.0, cache_gib=0.0, subset=str(listed)))  # fmt: skip
    ids = [source.ids() for source in pipeline.open_sources(config)]
    assert sorted(ids[0]) == ["patient00000_study1_view1_frontal", "patient00001_study2_view1_lateral"]
    assert ids[1] == ["00000001_000"]


def test_the_summary_is_what_the_table_says(tmp_path):
    tree = fake_trees.chexpert(tmp_path)
    summary, found = prepared("chexpert", tree, tmp_path / "data")
    assert summary == json.loads((tmp_path / "data/chexpert/summary.json").read_text())
    assert summary["splits"] == {"train": 4, "val": 2} and summary["views"] == {"frontal": 3, "lateral": 3}
    values = [film.labels["Edema"] for film in tree.films.values()]
    assert summary["positives"]["Edema"] == {
        "present": values.count(1.0), "absent": values.count(0.0), "uncertain": values.count(-1.0)
    }  # fmt: skip
    assert summary["patients"] == len({film.patient for film in tree.films.values()})
