"""Demographics: bins, folds without a patient on both sides, rows against scikit-learn, tables of any folder."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from configs import demographics as demographics_config
from raddino_jax import prepare
from raddino_jax.data.labels import LabelError
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import demographics, features
from raddino_jax.evals.demographics import People


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Features are kept under the home folder unless a config says where."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def config_of(arguments="", **fields):
    config = demographics_config.get_config(arguments)
    config.update(fields)
    return config


def crowd(n=120, width=6, seed=0):
    """Features that know sex well and age a little; three films a patient."""
    rng = np.random.default_rng(seed)
    sex = rng.integers(0, 2, n // 3).repeat(3)
    age = rng.uniform(15, 90, n // 3).repeat(3).round(1)
    x = rng.normal(size=(n, width)).astype(np.float32)
    x[:, 0] += 4 * sex
    x[:, 1] += age / 20
    race = np.array(["a", "b"])[np.arange(n) // 3 % 2]
    columns = {"sex": np.array(["F", "M"])[sex], "age": age.astype(str), "race": race}
    return x, People([None] * n, np.array([f"p{i // 3}" for i in range(n)]), columns, "real")


# --- classes --------------------------------------------------------------------------------------------------


def test_bins_are_the_papers_and_hold_their_lower_edge():
    bins = demographics_config.get_config().bins
    found = demographics.binned(["19.99", "20", "39.9", "40", "60", "79", "80", "100", "", "nan"], bins.age)
    assert list(found) == ["<20", "20-40", "20-40", "40-60", "60-80", "60-80", ">=80", ">=80", "", ""]
    assert list(demographics.binned(["49", "50", "95"], bins.weight)) == ["<50", "50-65", ">=95"]
    assert list(demographics.binned(["18.4", "18.5", "24.9", "35"], bins.bmi))[1:] == ["18.5-25", "18.5-25", ">=35"]
    assert all(len(edges) == 4 for edges in bins.values())  # five classes each


def test_what_is_no_number_is_named():
    with pytest.raises(LabelError, match="'age', film 1: expected a number or nothing, found 'old'"):
        demographics.binned(["3", "old"], (20.0,), "age")


def test_a_target_with_one_class_is_refused():
    _, people = crowd()
    people.columns["sex"][:] = "F"
    with pytest.raises(LabelError, match="'sex': fewer than two classes among 120 films"):
        demographics.classes_of("sex", people, config_of())


def test_weights_of_several_sets_are_not_offered_where_one_is_read():
    with pytest.raises(ValueError, match="weights"):
        config_of("data.weights=(1.0,)")


# --- folds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [2, 5])
def test_each_known_film_is_tested_once_and_no_patient_is_on_both_sides(folds, seed):
    rng = np.random.default_rng(seed)
    people = People([None] * 90, np.array([f"p{k}" for k in rng.integers(0, 25, 90)]), {}, "real")
    known = np.sort(rng.permutation(90)[:70])
    found = demographics.folds_of(people, known, config_of(folds=folds, seed=seed))
    assert sorted(np.concatenate([fold.test for fold in found])) == list(known)
    for fold in found:
        assert not set(people.patients[fold.train]) & set(people.patients[fold.test])
        assert sorted([*fold.train, *fold.test]) == list(known)
    if seed:
        other = demographics.folds_of(people, known, config_of(folds=folds, seed=seed + 10))
        assert any(list(a.test) != list(b.test) for a, b in zip(found, other, strict=True))


def test_plain_folds_tear_patients_apart_only_where_asked():
    _, people = crowd()
    found = demographics.folds_of(people, np.arange(120), config_of(by_patient=False))
    assert any(set(people.patients[f.train]) & set(people.patients[f.test]) for f in found)


def test_too_few_patients_are_told():
    people = People([None] * 9, np.array(["a", "b", "c"] * 3), {}, "real")
    with pytest.raises(DataError, match="5 folds need as many patients, found 3"):
        demographics.folds_of(people, np.arange(9), config_of())


def test_an_official_split_is_one_fold_and_must_not_tear_patients():
    _, people = crowd()
    part = np.array(["train", "val", "test"])[np.arange(120) // 3 % 3]
    people.columns["split"] = part
    (fold,) = demographics.folds_of(people, np.arange(120), config_of(split_column="split"))
    assert set(part[fold.test]) == {"test"} and set(part[fold.train]) == {"train", "val"}
    people.columns["split"] = np.array(["train", "test"] * 60)
    with pytest.raises(LabelError, match="40 patients have films in test and elsewhere"):
        demographics.folds_of(people, np.arange(120), config_of(split_column="split"))
    people.columns["split"] = np.array(["train", "holdout"] * 60)
    with pytest.raises(LabelError, match="'split': expected train.*holdout"):
        demographics.folds_of(people, np.arange(120), config_of(split_column="split"))


# --- judging --------------------------------------------------------------------------------------------------


def judged(config, x, people, name="e"):
    asked = {target: demographics.classes_of(target, people, config) for target in config.targets}
    return {(r["class"], r.get("stratum", "")): r for r in demographics.judge(name, x, asked, people, config)}


def test_accuracy_is_that_of_sklearn_on_the_same_folds():
    x, people = crowd()
    config = config_of(targets=("sex", "age"), solver="sklearn")
    rows = judged(config, x, people)
    for target in ("sex", "age"):
        classes = demographics.classes_of(target, people, config)
        values = [
            LogisticRegression().fit(x[fold.train], classes[fold.train]).score(x[fold.test], classes[fold.test])
            for fold in demographics.folds_of(people, np.arange(120), config)
        ]
        row = rows[target, ""]
        assert row["value"] == pytest.approx(np.mean(values)) and row["std"] == pytest.approx(np.std(values, ddof=1))
        assert (row["n"], row["folds"], row["solver"], row["data"]) == (120, 5, "sklearn", "real")
    assert rows["sex", ""]["value"] > 0.9 > rows["age", ""]["value"] > 0.3


def test_films_without_a_value_take_no_part():
    x, people = crowd()
    people.columns["age"][:30] = ""
    assert judged(config_of(targets=("age",)), x, people)["age", ""]["n"] == 90


def test_the_majority_stands_beside_the_encoders():
    x, people = crowd()
    config = config_of(targets=("sex",))
    row = judged(config, None, people, "majority")["sex", ""]
    classes, values = people.columns["sex"], []
    for fold in demographics.folds_of(people, np.arange(120), config):
        names, counts = np.unique(classes[fold.train], return_counts=True)
        values.append((classes[fold.test] == names[counts.argmax()]).mean())
    assert row["value"] == pytest.approx(np.mean(values)) and row["encoder"] == "majority"


def test_strata_tell_each_group_and_the_worst():
    x, people = crowd()
    config = config_of(targets=("sex",), strata=("race",))
    rows = judged(config, x, people)
    assert {s for _, s in rows} == {"", "race=a", "race=b", "race: all", "race: worst"}
    assert rows["sex", "race=a"]["n"] + rows["sex", "race=b"]["n"] == 120
    assert rows["sex", "race: worst"]["value"] == min(rows["sex", f"race={g}"]["value"] for g in "ab")


def test_one_split_has_the_interval_of_its_patients():
    x, people = crowd()
    people.columns["split"] = np.array(["train", "val", "test"])[np.arange(120) // 3 % 3]
    row = judged(config_of(targets=("age",), split_column="split"), x, people)["age", ""]
    assert row["std"] is None and row["folds"] == 1 and row["n"] == 39
    assert row["interval"][0] < row["value"] < row["interval"][1]


# --- whole runs -----------------------------------------------------------------------------------------------


def read(folder):
    return {(r["encoder"], r["class"]): r for r in json.loads((folder / "results.json").read_text())}


def test_drawn_films_are_judged_from_pixels_and_marked(tmp_path, capsys):
    config = config_of("synthetic", encoder="pixels", standardize=True, targets=("sex", "view"))
    config.data.update(synthetic_size=60, image_size=64)
    demographics.run(config, tmp_path)
    rows = read(tmp_path)
    assert {name for name, _ in rows} == {"pixels", "majority"} and {r["data"] for r in rows.values()} == {"synthetic"}
    assert rows["pixels", "view"]["value"] > rows["majority", "view"]["value"]
    before = (tmp_path / "results.json").stat().st_mtime_ns
    demographics.run(config, tmp_path)  # a finished run prints what it found
    assert (tmp_path / "results.json").stat().st_mtime_ns == before
    assert capsys.readouterr().err.count("accuracy") == 8


def folder(tmp_path, n=24):
    """A folder of films whose brightness tells sex, and its table."""
    films = tmp_path / "films"
    films.mkdir()
    rows = []
    for i in range(n):
        rng = np.random.default_rng(i)
        sex = "FM"[i // 2 % 2]
        level = 60 if sex == "F" else 180
        Image.fromarray(rng.integers(level, level + 40, (40, 40), np.uint8)).save(films / f"f{i}.png")
        about = {"patient_id": f"p{i // 2}", "sex": sex, "years": 20 + i, "site": "ab"[i % 2]}
        rows.append({"file": f"films/f{i}.png"} | about)
    return films, rows


def write(path, rows):
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def folder_config(films, table, **fields):
    config = config_of(encoder="pixels", csv=table, folds=3, **{"targets": ("sex",)} | fields)
    config.data.update(sources=(f"folder:{films}",), image_size=32)
    return config


def test_features_are_computed_once_and_anew_when_a_film_changes(tmp_path, monkeypatch):
    films, rows = folder(tmp_path)
    config = folder_config(films, write(tmp_path / "t.csv", rows))
    encoded, rasters = [], features._rasters
    monkeypatch.setattr(features, "_rasters", lambda films: encoded.append(len(films)) or rasters(films))
    for workdir in ("a", "b"):
        (tmp_path / workdir).mkdir()
        demographics.run(config, tmp_path / workdir)
    assert encoded == [24] and read(tmp_path / "a") == read(tmp_path / "b")
    Image.new("L", (32, 32), 99).save(next(films.rglob("*.png")))
    (tmp_path / "c").mkdir()
    demographics.run(config, tmp_path / "c")
    assert encoded == [24, 24]


def test_any_folder_with_a_table(tmp_path):
    films, rows = folder(tmp_path)
    config = folder_config(films, write(tmp_path / "t.csv", rows), targets=("sex", "age"), bins={"age": (26.0, 40.0)})
    config.columns.age = "years"
    (tmp_path / "out").mkdir()
    demographics.run(config, tmp_path / "out")
    found = read(tmp_path / "out")
    assert found["pixels", "sex"]["value"] == 1 and found["pixels", "sex"]["data"] == "real"
    assert found["pixels", "age"]["classes"] == 3
    config.where = "site=a"
    assert len(demographics.read_people(config).films) == 12


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c, r: [row.pop("sex") for row in r], "t.csv: no column 'sex'; the file has file"),
        (lambda c, r: r[3].update(file="films/nowhere.png"), "row 5: no film 'films/nowhere.png'"),
        (lambda c, r: r[3].update(file="films/f1.png"), "row 5, column 'file'.*row 3 already"),
        (lambda c, r: c.update(csv=""), "name its table with --config.csv"),
        (lambda c, r: c.update(targets=("weight",)), "no column 'weight'"),
        (lambda c, r: c.update(where="site=z"), "no row has site=z"),
        (lambda c, r: c.update(strata=("race",)), "no column 'race'"),
    ],
)
def test_a_wrong_table_is_named_by_row_and_column(tmp_path, change, words):
    films, rows = folder(tmp_path, 8)
    config = folder_config(films, str(tmp_path / "t.csv"))
    change(config, rows)
    write(tmp_path / "t.csv", rows)
    with pytest.raises(LabelError, match=words):
        demographics.run(config, tmp_path)


def test_a_prepared_dataset_has_its_columns(tmp_path):
    films, rows = folder(tmp_path)
    for row in rows:
        row["age"] = row.pop("years")
    table = write(tmp_path / "t.csv", [{"path": r["file"].removeprefix("films/")} | r for r in rows])
    where = [f"--raw_dir={films}", f"--data_dir={tmp_path / 'prepared'}", f"--csv={table}"]
    prepare.main(["--dataset=folder", "--name=ours", "--size=32", *where])
    config = config_of(encoder="pixels", folds=3, targets=("sex", "age"))
    config.data.update(sources=("ours",), data_dir=str(tmp_path / "prepared"), image_size=32)
    demographics.run(config, tmp_path)
    found = read(tmp_path)
    assert found["pixels", "sex"]["value"] == 1 and found["pixels", "age"]["n"] == 24
    config.targets = ("weight",)
    with pytest.raises(LabelError, match="ours has no column 'weight'"):
        demographics.read_people(config)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(targets=()), "targets is empty"), (dict(solver="newton"), "solver='newton' must be in"),
        (dict(folds=1), "folds must be at least 2"), (dict(feature="all"), "feature='all' must be in cls"),
        (dict(c=0.0), "c and tol must be positive"), (dict(max_iter=0), "max_iter must be at least 1"),
        (dict(data={"sources": ("a", "b")}), "must name one set"),
        (dict(bins={"age": (40.0, 20.0)}), "bins must have rising edges"),
    ],
)
def test_what_cannot_be_is_refused_before_a_film_is_read(fields, words):
    with pytest.raises(DataError, match=words):
        demographics.check(config_of(**fields))
