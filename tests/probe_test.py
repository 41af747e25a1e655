"""The probe against scikit-learn and closed forms, its splits, and the table of labels."""

import csv
import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from raddino_jax.data.labels import LabelError, Labels, read_column, read_csv
from raddino_jax.evals import probe, scores


def labelled(n=120, width=12, seed=0):
    """Features of which the first two tell the first two of three classes; three films a patient."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)).astype(np.float32)
    y = (x[:, :3] + rng.normal(scale=[0.3, 1.0, 9.0], size=(n, 3)) > 0).astype(np.float32)
    return x, Labels(("easy", "hard", "none"), y, np.array([f"p{i // 3}" for i in range(n)]), np.arange(n))


def test_no_patient_is_on_both_sides_of_any_split():
    _, labels = labelled()
    for seed in range(20):
        train, test = probe.split(labels.patients, seed)
        assert not set(labels.patients[train]) & set(labels.patients[test])
        assert (train ^ test).all() and 0.4 < test.mean() < 0.6


def test_ridge_is_sklearns_with_the_penalty_of_leave_one_out():
    x, labels = labelled()
    train, test = probe.split(labels.patients, 0)
    found = probe.ridge(x, labels.values, train, test)
    scaler = StandardScaler().fit(x[train])
    for column in range(3):
        inside, outside = scaler.transform(x[train]), scaler.transform(x[test])
        y = labels.values[train, column]
        candidates = [Ridge(alpha=a).fit(inside, y).predict(outside) for a in probe.PENALTIES]
        assert min(np.abs(found[:, column] - c).max() for c in candidates) < 1e-5  # float64 inside both


def test_films_without_a_label_take_no_part():
    x, labels = labelled()
    train, test = probe.split(labels.patients, 1)
    gaps = labels.values.copy()
    gaps[::2, 1] = np.nan
    found = probe.ridge(x, gaps, train, test)
    kept = train & ~np.isnan(gaps[:, 1])
    alone = probe.ridge(x, gaps[:, 1:2], kept, test)
    np.testing.assert_allclose(found[:, 1], alone[:, 0], atol=1e-6)
    assert scores.per_class("auprc", gaps[test], found)[1] == pytest.approx(
        average_precision_score(gaps[test, 1][~np.isnan(gaps[test, 1])], found[~np.isnan(gaps[test, 1]), 1]))


def test_vote_finds_the_twin():
    x, labels = labelled(n=60)
    train, test = probe.split(labels.patients, 0)
    votes = probe.vote(x, labels.values, train, test)
    assert votes.shape == (test.sum(), 3) and ((0 <= votes) & (votes <= 1)).all()
    ranked = scores.per_class("auprc", labels.values[test], votes)
    assert ranked[0] > ranked[2]


def test_votes_in_blocks_are_those_of_one_sort_of_all_distances(monkeypatch):
    """Films that lie equally far come in the order of the table."""
    monkeypatch.setattr(probe, "BLOCK", 7)
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, (300, 3)).astype(np.float32)  # 27 different films
    values = np.where(rng.random((300, 2)) < 0.2, np.nan, rng.random((300, 2)) < 0.5)
    train = rng.random(300) < 0.6
    z = StandardScaler().fit(x[train]).transform(x)
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    blocks = np.concatenate([part @ z[train].T for part in np.split(z[~train], range(7, (~train).sum(), 7))])
    near = np.argsort(-blocks, axis=1, kind="stable")[:, : probe.NEIGHBOURS]
    expected = np.nan_to_num(np.nanmean(values[train][near], axis=1))
    np.testing.assert_allclose(probe.vote(x, values, train, ~train), expected)
    few = np.arange(300) < 9  # fewer films than neighbours
    np.testing.assert_allclose(probe.vote(x, values, few, ~few)[5], np.nanmean(values[few], axis=0))


def test_a_vote_never_holds_all_distances(monkeypatch):
    monkeypatch.setattr(probe, "BLOCK", 50)
    x, labels = labelled(n=4000, width=3)
    train = np.arange(4000) < 2000
    tracemalloc.start()
    probe.vote(x, labels.values, train, ~train)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2000 * 2000 * x.itemsize / 2


def test_scores_order_the_classes_and_leave_out_the_undefined():
    x, labels = labelled()
    found = probe.score(x, labels, 0)
    assert found["auprc", "easy"] > found["auprc", "hard"] > found["auprc", "none"] - 0.1
    constant = Labels(labels.names, labels.values * [1, 1, 0], labels.patients, labels.films)
    found = probe.score(x, constant, 0)
    assert np.isnan(found["auprc", "none"])
    assert found["auprc", "macro"] == pytest.approx((found["auprc", "easy"] + found["auprc", "hard"]) / 2)


def test_interval_is_students():
    mean, half = scores.interval([0.4, 0.5, 0.6, 0.5, 0.5])
    assert mean == pytest.approx(0.5) and half == pytest.approx(2.7764 * 0.0707107 / 5**0.5, rel=1e-3)


# --- the table of labels -----------------------------------------------------------------------------------


def table(path, rows):
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def rows():
    return [dict(file=f"images/f{i}.png", patient=f"p{i // 2}", site="a" if i < 6 else "b", effusion=v)
            for i, v in enumerate(["0", "1", "", "1.0", "0.0", "1", "0", "1"])]


def read(path, where="", columns=("effusion",)):
    files = [path.parent / f"f{i}.png" for i in range(8)]
    return read_csv(str(path), files, columns, "file", "patient", where)


def test_labels_are_read_with_gaps_and_by_source(tmp_path):
    path = tmp_path / "labels.csv"
    table(path, rows())
    found = read(path)
    np.testing.assert_array_equal(found.values[:, 0], [0, 1, np.nan, 1, 0, 1, 0, 1])
    assert list(found.films) == list(range(8)) and found.patients[3] == "p1"
    assert len(read(path, "site=a")) == 6


def broken(change):
    changed = rows()
    change(changed)
    return changed


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: [row.pop("effusion") for row in r], ["no column 'effusion'"]),
        (lambda r: r[2].update(effusion="maybe"), ["row 4", "'effusion'", "'maybe'"]),
        (lambda r: r[5].update(file="images/f1.png"), ["row 7", "row 3", "f1.png"]),
        (lambda r: r[5].update(file="images/f77.png"), ["row 7", "f77.png"]),
        (lambda r: [row.update(effusion="1") for row in r], ["'effusion'", "one class"]),
    ],
)
def test_a_wrong_table_is_named_by_row_and_column(tmp_path, change, words):
    path = tmp_path / "labels.csv"
    table(path, broken(change))
    with pytest.raises(LabelError) as error:
        read(path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_words_of_a_column_stand_beside_the_films(tmp_path):
    path, changed = tmp_path / "labels.csv", rows()
    for i, row in enumerate(changed):
        row |= {"view": ["PA", " AP "][i % 2], "age": "" if i == 3 else str(40.5 + i)}
    table(path, changed[::-1])
    files = [path.parent / f"f{i}.png" for i in range(8)]

    def words(column, films=None, where=""):
        return list(read_column(str(path), files, column, "file", where, films))

    assert words("view", range(8)) == ["PA", "AP"] * 4 and words("view") == ["AP", "PA"] * 4
    assert words("age", [0, 3]) == ["40.5", ""]
    assert words("age", where="site=b") == ["47.5", "46.5"]
    with pytest.raises(LabelError, match="no column 'sex'"):
        words("sex")
    with pytest.raises(LabelError, match="column 'view': no row for film 'f2.png'"):
        words("view", [7, 2], "site=b")


def test_a_film_of_nobody_and_a_row_that_ends_early_are_named(tmp_path):
    path, changed = tmp_path / "labels.csv", rows()
    changed[4]["patient"] = " "
    table(path, changed)
    with pytest.raises(LabelError, match="row 6, column 'patient': empty"):
        read(path)
    table(path, rows())
    path.write_text(path.read_text().replace("images/f3.png,p1,a,1.0", "images/f3.png,p1"))
    with pytest.raises(LabelError, match="row 5, column 'effusion': the row ends before it"):
        read(path)
    with pytest.raises(LabelError, match="expected a CSV, could not read it"):
        read(tmp_path / "nowhere.csv")
