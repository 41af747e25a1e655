"""Films with masks from folders, tables, prepared datasets and drawings; masks that are not what they should be."""

import csv

import fake_trees
import numpy as np
import pytest
from PIL import Image

from configs import segment as segment_config
from raddino_jax import prepare
from raddino_jax.data import cases, synthetic
from raddino_jax.data.cases import CaseError
from raddino_jax.data.shapes import IGNORE


def config(**fields):
    given = segment_config.get_config("dataset=folder")
    for name, value in fields.items():
        given.update_from_flattened_dict({name.replace("__", "."): value})
    return given


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def two_lungs(height=40, width=50):
    mask = np.zeros((height, width), np.uint8)
    mask[8:30, 5:20], mask[8:30, 28:45] = 127, 255
    return mask


@pytest.fixture
def tree(tmp_path):
    """Three films, a table, masks of both lungs, and one region to be left out."""
    rng = np.random.default_rng(0)
    for name in "abc":
        save(tmp_path / "images" / f"{name}.png", rng.integers(0, 256, (40, 50)))
        save(tmp_path / "masks" / f"{name}.png", two_lungs())
    ignore = np.zeros((40, 50))
    ignore[:10] = 255
    save(tmp_path / "ignore" / "b.png", ignore)
    rows = [
        ("images/a.png", "masks/a.png", "", "1", "train", "x"),
        ("images/b.png", "masks/b.png", "ignore/b.png", "2", "val", "x"),
        ("images/c.png", "masks/c.png", "", "3", "test", "y"),
        ("images/d.png", "", "", "4", "test", "y"),
    ]
    with (tmp_path / "films.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "mask_file", "ignore", "patient_id", "split", "source"), *rows])
    return tmp_path


SIDES = ("right lung=127", "left lung=255")


def test_a_table_names_films_masks_patients_and_splits(tree):
    found = cases.open_cases(config(data__csv=str(tree / "films.csv"), structures=SIDES, data__ignore_column="ignore"))
    assert found.structures == ("right lung", "left lung") and found.kind == "real"
    assert [(c.id, c.patient, c.split) for c in found.cases] == [
        ("images/a.png", "1", "train"), ("images/b.png", "2", "val"), ("images/c.png", "3", "test"),
    ]  # fmt: skip
    film, masks = found.load(0)
    np.testing.assert_array_equal(film, np.asarray(Image.open(tree / "images" / "a.png")))
    np.testing.assert_array_equal(masks, [two_lungs() == 127, two_lungs() == 255])
    _, masks = found.load(1)
    assert (masks[:, :10] == IGNORE).all() and (masks[:, 10:] != IGNORE).all()


def test_where_keeps_rows_and_folders_may_lie_elsewhere(tree):
    given = config(data__csv=str(tree / "films.csv"), data__where="source=y", structures=("lungs>0",))
    assert [case.id for case in cases.open_cases(given).cases] == ["images/c.png"]
    moved = tree / "elsewhere"
    (tree / "images").rename(moved)
    given.data.images = str(moved)
    assert cases.open_cases(given).load(0)[1].sum() == (two_lungs() > 0).sum()


def test_two_folders_need_no_table(tree):
    found = cases.open_cases(config(data__images=str(tree / "images"), data__masks=str(tree / "masks")))
    assert found.structures == ("mask",) and [case.patient for case in found.cases] == ["a", "b", "c"]
    np.testing.assert_array_equal(found.load(2)[1][0], two_lungs() > 0)


def in_folders(root, *names):
    """The source of films and masks, each of a level of its own, 10, 20, ... in the order of their names."""
    for level, name in enumerate(names, start=1):
        save(root / name, np.full((8, 8), 10 * level))
    return cases.open_cases(config(data__images=str(root / "images"), data__masks=str(root / "masks")))


def test_films_in_subfolders_have_the_masks_of_their_own_subfolder(tmp_path):
    found = in_folders(tmp_path, "images/p1/film.png", "images/p2/film.png", "masks/p1/film.png")
    assert [(case.id, case.patient) for case in found.cases] == [("p1/film.png", "p1/film")]
    assert (found.load(0)[0] == 10).all()
    found = in_folders(tmp_path, "images/p1/film.png", "images/p2/film.png", "masks/p1/film.png", "masks/p2/film.png")
    assert [case.patient for case in found.cases] == ["p1/film", "p2/film"] and (found.load(1)[0] == 20).all()


def test_a_mask_that_lies_elsewhere_is_found_by_a_name_that_nothing_else_has(tmp_path):
    found = in_folders(tmp_path, "images/p1/a.png", "images/p1/b.png", "masks/all/a.png", "masks/b.tif")
    assert [case.id for case in found.cases] == ["p1/a.png", "p1/b.png"] and (found.load(1)[0] == 20).all()


@pytest.mark.parametrize("names, both", [
    (("images/p1/film.png", "images/p2/film.png", "masks/film.png"), "p1/film.png and .*p2/film.png"),
    (("images/film.png", "masks/p1/film.png", "masks/p2/film.png"), "p1/film.png and .*p2/film.png"),
    (("images/a.png", "images/a.bmp", "masks/a.png"), "a.bmp and .*a.png"),
])  # fmt: skip
def test_films_and_masks_that_cannot_be_told_apart_by_name_are_refused(names, both, tmp_path):
    with pytest.raises(CaseError, match=both):
        in_folders(tmp_path, *names)


def test_hidden_files_are_neither_films_nor_masks_and_numbers_are_no_suffix(tmp_path):
    for name in ("images/._a.png", "images/.DS_Store", "images/.old/a.png", "masks/.old/a.png", "masks/._a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing")
    save(tmp_path / "images" / "1.2.840.png", np.zeros((8, 8)))
    (tmp_path / "images" / "1.2.840.png").rename(tmp_path / "images" / "1.2.840")
    found = in_folders(tmp_path, "images/a.png", "masks/a.png", "masks/1.2.840.png", "masks/1.2.841.png")
    assert [case.id for case in found.cases] == ["1.2.840", "a.png"]


@pytest.mark.parametrize("values, expected", [(np.zeros((40, 50)), 0), (np.full((40, 50), 127), 1)])
def test_masks_may_be_empty_or_full(tree, values, expected):
    save(tree / "masks" / "a.png", values)
    found = cases.open_cases(config(data__csv=str(tree / "films.csv"), structures=SIDES)).load(0)[1]
    assert (found[0] == expected).all() and not found[1].any()


def test_a_mask_of_another_size_is_brought_to_the_films(tree):
    save(tree / "masks" / "a.png", np.kron(two_lungs(), np.ones((2, 2))))
    found = cases.open_cases(config(data__csv=str(tree / "films.csv"), structures=SIDES)).load(0)[1]
    np.testing.assert_array_equal(found, [two_lungs() == 127, two_lungs() == 255])
    save(tree / "masks" / "a.png", two_lungs(50, 40))
    with pytest.raises(CaseError, match="50 x 40 pixels does not belong to a film of 40 x 50"):
        cases.open_cases(config(data__csv=str(tree / "films.csv"), structures=SIDES)).load(0)


def test_other_values_are_refused_or_by_request_background_or_left_out(tree):
    given = config(data__csv=str(tree / "films.csv"), structures=("right lung=127",))
    with pytest.raises(CaseError, match=r"a.png: no structure stands for the values 255"):
        cases.open_cases(given).load(0)
    given.data.other = "background"
    np.testing.assert_array_equal(cases.open_cases(given).load(0)[1][0], two_lungs() == 127)
    given.data.other = "ignore"
    found = cases.open_cases(given).load(0)[1][0]
    np.testing.assert_array_equal(found == IGNORE, two_lungs() == 255)
    given.data.other = "perhaps"
    with pytest.raises(CaseError, match="must be one of refuse, background, ignore"):
        cases.open_cases(given)


@pytest.mark.parametrize("text, expected", [
    ("heart=3|4", cases.Rule("heart", (3, 4))), ("lungs>0", cases.Rule("lungs", (), 0)),
    (" left lung = 255 ", cases.Rule("left lung", (255,))),
])  # fmt: skip
def test_rules_of_structures(text, expected):
    assert cases.rule_of(text) == expected


@pytest.mark.parametrize("text", ["lungs", "lungs=", "lungs>", "=3", "lungs=a"])
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(CaseError, match="is none of 'name=127'"):
        cases.rule_of(text)


@pytest.mark.parametrize("fields, message", [
    (dict(data__csv="nowhere.csv"), "nowhere.csv: No such file"),
    (dict(data__images="nowhere", data__masks="nowhere"), "is no folder"),
    (dict(dataset="lungs"), "dataset 'mimic_lungs' is not prepared .*prepare --dataset=mimic_lungs"),
    (dict(dataset="synthetic", structures=("heart",)), "the synthetic films have no heart; they have right lung"),
])  # fmt: skip
def test_what_is_not_there_is_told(fields, message):
    with pytest.raises(CaseError, match=message):
        cases.open_cases(config(**fields))


def test_a_table_without_a_column_is_told(tree):
    with pytest.raises(CaseError, match="no column 'outline'; the file has file, mask_file"):
        cases.open_cases(config(data__csv=str(tree / "films.csv"), data__mask_column="outline"))
    (tree / "masks" / "c.png").unlink()
    with pytest.raises(CaseError, match="masks/c.png: not there"):
        cases.open_cases(config(data__csv=str(tree / "films.csv"), structures=SIDES))


def test_drawn_films_have_the_masks_they_were_drawn_with():
    given = config(dataset="synthetic", data__films=6, data__image_size=48,
                   structures=("left lung", "right upper", "left rib 3", "effusion"))
    found = cases.open_cases(given)
    assert len(found.cases) == 6 and found.kind == "synthetic"
    assert all(case.facts["view"] != "LATERAL" for case in found.cases)
    film, masks = found.load(2)
    drawn = synthetic.film(found.places[2], 48, seed=2, masks=True)
    np.testing.assert_array_equal(film, drawn.image)
    expected = [drawn.masks["lungs"][1], drawn.masks["zones"][0], drawn.masks["ribs"][12], drawn.masks["effusion"]]
    np.testing.assert_array_equal(masks, expected)
    assert cases.open_cases(config(dataset="synthetic", data__films=2)).structures == ("right lung", "left lung")


@pytest.mark.parametrize("target, name", [
    ("lungs", "mimic_lungs"), ("zones", "chest_imagenome"), ("pneumothorax", "candid_ptx"), ("tubes", "candid_ptx"),
    ("ribs", "vindr_ribcxr"),
])  # fmt: skip
def test_the_papers_targets_from_prepared_datasets(target, name, tmp_path):
    tree = fake_trees.TREES[name](tmp_path)
    prepare.prepare(name, str(tree.raw), str(tmp_path / "data"), **(dict(size=tree.size, workers=1) | tree.options))
    found = cases.open_cases(config(dataset=target, data__data_dir=str(tmp_path / "data")))
    assert {case.id for case in found.cases} == set(tree.films)
    for i, case in enumerate(found.cases):
        film, masks = found.load(i)
        expected = tree.films[case.id]
        assert film.shape == expected.pixels.shape
        for structure, mask in zip(found.structures, masks, strict=True):
            np.testing.assert_array_equal(mask, expected.masks[structure], err_msg=f"{case.id} {structure}")


def case(patient, split=""):
    return cases.Case(f"film of {patient}", patient, split)


def test_splits_are_drawn_by_patient():
    films = [case(str(i // 3)) for i in range(300)]
    found = cases.with_splits(films, seed=0)
    of = {}
    for one, split in zip(films, found, strict=True):
        assert of.setdefault(one.patient, split) == split
    assert [found.count(split) for split in cases.SPLITS] == [210, 45, 45]
    assert cases.with_splits(films, seed=0) == found != cases.with_splits(films, seed=1)


def test_splits_of_the_source_are_kept_and_val_is_taken_from_train():
    films = [case(str(i), "train" if i < 80 else "test") for i in range(100)]
    found = cases.with_splits(films, seed=0)
    assert found[80:] == ["test"] * 20 and 5 < found[:80].count("val") < 20
    assert cases.with_splits([case("1", "train"), case("2", "val"), case("3", "test")], 0) == list(cases.SPLITS)
    with pytest.raises(CaseError, match="found 'valid'"):
        cases.with_splits([case("1", "valid")], 0)
