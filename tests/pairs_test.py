"""Films with their reports: each source against what was put there, splits by patient, and what is refused."""

import csv

import fake_trees
import numpy as np
import pytest

from configs import report as report_config
from raddino_jax import prepare
from raddino_jax.data import images, pairs, reports, synthetic
from raddino_jax.data.cases import CaseError
from raddino_jax.data.labels import LabelError
from raddino_jax.data.pairs import PairError


def config(arguments="", **data):
    given = report_config.get_config(arguments)
    given.data.update(data)
    return given


def test_synthetic_films_come_with_their_sentences():
    given = config("dataset=synthetic", films=60, image_size=32)
    found = pairs.open_pairs(given)
    assert found.kind == "synthetic" and 40 < len(found) < 60
    for place in (0, len(found) - 1):
        number = int(found.pairs[place].id.rpartition("-")[2])
        drawn = synthetic.film(number, 32, seed=3)
        assert found.pairs[place].text == drawn.sentence and drawn.labels["view"] != "LATERAL"
        np.testing.assert_array_equal(found.film(place), drawn.image)
        assert found.raw(place) == f"synthetic 3 {number} 32".encode()
    assert sum(len(found.split(name)) for name in ("train", "val", "test")) == len(found)
    assert _torn(found) == []
    given.seed = 1
    assert [p.split for p in pairs.open_pairs(given).pairs] != [p.split for p in found.pairs]


def _torn(found) -> list:
    splits: dict = {}
    return [pair.patient for pair in found.pairs if splits.setdefault(pair.patient, pair.split) != pair.split]


# --- prepared datasets ----------------------------------------------------------------------------------------


def write_reports(folder, studies) -> None:
    for study, findings in studies.items():
        path = folder / "files" / "p10" / f"s{study}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f" FINAL REPORT\n FINDINGS:  {findings}\n\n IMPRESSION:  None.\n")


@pytest.fixture(scope="module")
def mimic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimic")
    tree = fake_trees.mimic_cxr(folder)
    prepare.prepare("mimic_cxr", str(tree.raw), str(folder / "prepared"), size=tree.size, workers=1)
    texts = {f"5000000{k}": f"Heart \n size {k}." for k in (0, 1, 2, 3, 4, 5, 7)} | {"50000006": ""}
    write_reports(folder / "reports", texts)
    return folder, tree


def test_mimic_has_frontal_films_with_findings_of_the_official_splits(mimic):
    folder, tree = mimic
    found = pairs.open_pairs(config(data_dir=str(folder / "prepared"), reports=str(folder / "reports"), val=0.0))
    # Of the films 2 and 3 are lateral, 4 and 5 of another or no known view, and study 6 has no findings.
    told = [(pair.id, pair.split, pair.text) for pair in found.pairs]
    names = {k: fake_trees.MIMIC_ID.format(k) for k in (0, 1, 7)}
    splits = {0: "train", 1: "train", 7: "test"}
    assert sorted(told) == sorted((names[k], splits[k], f"Heart size {k}.") for k in names)
    for place, pair in enumerate(found.pairs):
        np.testing.assert_array_equal(found.film(place), tree.films[pair.id].pixels)
        assert tree.films[pair.id].pixels.tobytes() in found.raw(place)


def test_a_share_of_the_patients_of_train_validates(mimic):
    folder, _ = mimic
    places = dict(data_dir=str(folder / "prepared"), reports=str(folder / "reports"))
    assert {p.split for p in pairs.open_pairs(config(val=1.0, **places)).pairs} == {"val", "test"}
    patients = [str(10_000_000 + k) for k in range(64_586)]
    share = np.mean([pairs._mimic_split({"split": "train", "patient": p}, 0.033) == "val" for p in patients])
    assert share == pytest.approx(0.033, abs=0.003)
    assert pairs._mimic_split({"split": "test", "patient": patients[0]}, 1.0) == "test"


def test_the_curators_table_serves_as_the_reports_do(mimic, tmp_path):
    folder, _ = mimic
    path = tmp_path / "mimic_cxr_sectioned.csv"
    rows = [[f"s5000000{k}", "None.", f"Heart size {k}.", "", ""] for k in (0, 1, 7)]
    fake_trees.table(path, ["study", "impression", "findings", "last_paragraph", "comparison"], rows)
    places = [dict(data_dir=str(folder / "prepared"), reports=str(where)) for where in (path, folder / "reports")]
    first, second = (pairs.open_pairs(config(**place)).pairs for place in places)
    assert [(p.id, p.text, p.split) for p in first] == [(p.id, p.text, p.split) for p in second]


def test_a_study_with_two_frontal_films_counts_twice_and_lateral_ones_never(tmp_path, monkeypatch):
    known = [
        {"id": name, "study": "5", "patient": "1", "split": "train", "view": view}
        for name, view in (("a", "frontal"), ("b", "frontal"), ("c", "lateral"))
    ]
    monkeypatch.setattr(pairs, "_prepared", lambda *_: (None, known))
    write_reports(tmp_path, {"5": "Clear."})
    found = pairs.open_pairs(config(reports=str(tmp_path)))
    assert [(pair.id, pair.text) for pair in found.pairs] == [("a", "Clear."), ("b", "Clear.")]


@pytest.mark.parametrize("data, told", [
    (dict(data_dir=""), "is not prepared in data_dir ''"),
    (dict(reports=""), "reports='': expected the folder of mimic-cxr-reports.zip"),
    (dict(reports="gone"), "reports='gone': expected"),
    (dict(reports="empty"), "holds no report sSTUDY.txt"),
    (dict(reports="other"), "none of a study of the 8 prepared films"),
    (dict(reports="wrong.csv"), "expected a column study"),
])  # fmt: skip
def test_what_mimic_lacks_is_told(mimic, tmp_path, monkeypatch, data, told):
    folder, _ = mimic
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_reports(tmp_path / "other", {"7": "Clear."})
    (tmp_path / "wrong.csv").write_text("number,findings\ns1,Clear.\n")
    places = dict(data_dir=str(folder / "prepared"), reports=str(folder / "reports")) | data
    with pytest.raises(PairError, match=told):
        pairs.open_pairs(config(**places))


def test_iu_xray_has_the_first_frontal_film_of_each_report_as_a_test(tmp_path):
    tree = fake_trees.iu_xray(tmp_path)
    prepare.prepare("iu_xray", str(tree.raw), str(tmp_path / "prepared"), size=tree.size, workers=1)
    found = pairs.open_pairs(config("dataset=iu_xray", data_dir=str(tmp_path / "prepared")))
    assert {pair.split for pair in found.pairs} == {"test"} and len(found) == 2
    for place, pair in enumerate(found.pairs):
        expected = tree.films[pair.id]
        assert pair.text == reports.clean(expected.more["findings"]) and expected.view == "frontal"
        np.testing.assert_array_equal(found.film(place), expected.pixels)


def test_iu_xray_without_projections_is_refused(tmp_path):
    tree = fake_trees.iu_xray(tmp_path, "xml")
    prepare.prepare("iu_xray", str(tree.raw), str(tmp_path / "prepared"), size=tree.size, workers=1)
    with pytest.raises(PairError, match="put Kaggle's indiana_projections.csv"):
        pairs.open_pairs(config("dataset=iu_xray", data_dir=str(tmp_path / "prepared")))


# --- a folder -------------------------------------------------------------------------------------------------

COLUMNS = ("file", "findings", "patient_id", "split", "ward")


def folder_of(tmp_path, rows, columns=COLUMNS):
    for row in rows:
        fake_trees.png(tmp_path / "films" / row[0], fake_trees.drawn(len(row[0])))
    path = tmp_path / "films.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return dict(csv=str(path), images=str(tmp_path / "films"))


def test_a_folder_is_read_by_its_table(tmp_path):
    rows = [["a.png", "Clear\n lungs.", "1", "train", "x"], ["bb.png", "Effusion.", "2", "test", "y"],
            ["ccc.png", " ", "3", "test", "x"]]  # fmt: skip
    found = pairs.open_pairs(config("dataset=folder", **folder_of(tmp_path, rows)))
    told = [(pair.id, pair.text, pair.split, pair.facts["ward"]) for pair in found.pairs]
    assert told == [("a.png", "Clear lungs.", "train", "x"), ("bb.png", "Effusion.", "test", "y")]
    np.testing.assert_array_equal(found.film(1), images.read(tmp_path / "films" / "bb.png"))
    assert found.raw(1) == (tmp_path / "films" / "bb.png").read_bytes()
    one = pairs.open_pairs(config("dataset=folder", **folder_of(tmp_path, rows), where="ward=y"))
    assert [pair.id for pair in one.pairs] == ["bb.png"]


def test_splits_of_a_folder_may_be_drawn_by_patient(tmp_path):
    rows = [["x" * (k + 1) + ".png", "Clear.", str(k // 2), "", ""] for k in range(80)]
    found = pairs.open_pairs(config("dataset=folder", **folder_of(tmp_path, rows), split_column=""))
    assert {pair.split for pair in found.pairs} == {"train", "val", "test"} and _torn(found) == []


@pytest.mark.parametrize("row, columns, data, error, told", [
    (["a.png", "Clear.", "1", "train", ""], ("file", "text", "patient_id", "split", "ward"), {}, LabelError,
     "no column 'findings'; the file has file, text"),
    (["a.png", "Clear.", "1", "dev", ""], COLUMNS, {}, CaseError, "splits are train, val and test; found 'dev'"),
    (["a.png", "Clear.", "", "train", ""], COLUMNS, {}, PairError, "a.png has no patient"),
    (["a.png", "", "1", "train", ""], COLUMNS, {}, PairError, "no frontal film has a report with findings"),
    (["a.png", "Clear.", "1", "train", ""], COLUMNS, {"csv": "gone.csv"}, LabelError, "gone.csv: expected a CSV"),
    (["a.png", "Clear.", "1", "train", ""], COLUMNS, {"csv": ""}, PairError, "needs config.data.csv"),
    (["a.png", "Clear.", "1", "train", ""], COLUMNS, {"file_column": "findings"}, CaseError, "Clear.: not there"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_is_told(tmp_path, row, columns, data, error, told):
    places = folder_of(tmp_path, [row], columns) | data
    with pytest.raises(error, match=told):
        pairs.open_pairs(config("dataset=folder", **places))


def test_a_film_twice_and_a_broken_one_are_named(tmp_path):
    row = ["a.png", "Clear.", "1", "train", ""]
    with pytest.raises(PairError, match="a.png has several rows"):
        pairs.open_pairs(config("dataset=folder", **folder_of(tmp_path, [row, row])))
    places = folder_of(tmp_path, [row])
    (tmp_path / "films" / "a.png").write_bytes(b"no picture")
    with pytest.raises(PairError, match="a.png: .*take its row out"):
        pairs.open_pairs(config("dataset=folder", **places)).film(0)


# --- the control ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_exchanged_films_are_all_used_and_always_of_somebody_else(seed):
    rng = np.random.default_rng(seed)
    patients = [f"p{k}" for k in rng.integers(0, 40, 200)]
    found = pairs.exchanged(patients, seed)
    assert sorted(found) == list(range(200))
    assert all(patients[place] != patients[other] for place, other in enumerate(found))
    assert list(found) == list(pairs.exchanged(patients, seed)) != list(pairs.exchanged(patients, seed + 1))


def test_a_patient_with_most_of_the_films_cannot_be_exchanged():
    assert list(pairs.exchanged(["a", "b", "a", "b"], 0)) in ([1, 0, 3, 2], [1, 2, 3, 0], [3, 0, 1, 2], [3, 2, 1, 0])
    with pytest.raises(PairError, match="one patient has 3 of 4 pairs"):
        pairs.exchanged(["a", "a", "b", "a"], 0)
