"""Scores by group against loops, and what small or unknown groups become."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from raddino_jax.evals import fairness


def people(n=60, seed=0):
    rng = np.random.default_rng(seed)
    patients = np.array([f"p{i // 3}" for i in range(n)])
    groups = np.array(["asian", "black", "white"])[np.arange(n) // 3 % 3]
    return rng.random(n), groups, patients


def by_stratum(rows):
    return {row["stratum"]: row for row in rows}


def test_groups_are_told_apart_with_their_numbers():
    values, groups, patients = people()
    rows = by_stratum(fairness.strata(fairness.mean_of(values), {"race": groups}, patients))
    assert set(rows) == {"race=asian", "race=black", "race=white", "race: all", "race: worst"}
    means = {name: values[groups == name].mean() for name in np.unique(groups)}
    for name, mean in means.items():
        row = rows[f"race={name}"]
        assert row["value"] == pytest.approx(mean) and row["n"] == (groups == name).sum()
        assert row["patients"] == len(set(patients[groups == name]))
        assert row["interval"][0] < mean < row["interval"][1]
    assert rows["race: all"]["value"] == pytest.approx(values.mean())  # over films, not over groups
    worst = min(means, key=means.get)
    assert rows["race: worst"]["worst"] == f"race={worst}"
    assert rows["race: worst"]["gap"] == pytest.approx(values.mean() - means[worst])


def test_any_score_of_films_will_do():
    values, groups, patients = people()
    truth = np.arange(60) % 3 == 0  # every patient has a positive film, every resample too
    rows = by_stratum(fairness.strata(
        lambda index: average_precision_score(truth[index], values[index]), {"race": groups}, patients, resamples=5))
    for name in np.unique(groups):
        inside = groups == name
        assert rows[f"race={name}"]["value"] == pytest.approx(average_precision_score(truth[inside], values[inside]))


def test_the_interval_draws_patients_not_films():
    """Twenty films of each of six patients, all alike: with films drawn, the interval would be far too narrow."""
    values = np.repeat([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 20)
    patients = np.repeat([f"p{i}" for i in range(6)], 20)
    row = fairness.strata(fairness.mean_of(values), {"g": ["x"] * 120}, patients, resamples=2000)[0]
    assert row["std"] == pytest.approx(0.5 / 6**0.5, rel=0.1)
    # A plain loop over resamples says the same.
    rng, drawn = np.random.default_rng(5), []
    for _ in range(2000):
        chosen = rng.integers(0, 6, 6)
        drawn.append(np.mean([values[20 * i] for i in chosen]))
    assert row["interval"] == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=0.17)


def test_a_group_of_one_patient_is_listed_but_is_not_the_worst():
    values = np.array([0.9, 0.9, 0.8, 0.8, 0.0])
    rows = by_stratum(fairness.strata(
        fairness.mean_of(values), {"g": ["a", "a", "b", "b", "lone"]}, ["1", "2", "3", "4", "5"]))
    assert rows["g=lone"]["value"] == 0 and rows["g=lone"]["interval"] is None
    assert rows["g: worst"]["worst"] == "g=b"
    stricter = fairness.strata(fairness.mean_of(values), {"g": ["a", "a", "b", "b", "lone"]}, list("12345"), smallest=3)
    assert "g: worst" not in by_stratum(stricter)


def test_films_without_a_group_count_in_all_alone():
    values = np.array([1.0, 1.0, 0.0, 0.0])
    rows = by_stratum(fairness.strata(fairness.mean_of(values), {"g": ["a", "a", "", "nan"]}, list("1234")))
    assert set(rows) == {"g=a", "g: all", "g: worst"} and rows["g: all"]["value"] == 0.5


def test_what_cannot_be_scored_is_null_with_the_reason():
    values = np.array([np.nan, np.nan, 1.0, 0.0])
    rows = by_stratum(fairness.strata(fairness.mean_of(values), {"g": ["a", "a", "b", "b"]}, list("1234")))
    assert rows["g=a"]["value"] is None and "2 films" in rows["g=a"]["reason"]
    assert rows["g: worst"]["worst"] == "g=b"


def test_the_worst_error_is_the_highest():
    values, groups, patients = people()
    up, down = (
        fairness.strata(fairness.mean_of(values), {"g": groups}, patients, lower_is_better=lower)[-1]
        for lower in (False, True)
    )
    assert up["stratum"] == down["stratum"] == "g: worst"
    assert up["value"] < down["value"]


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="'race': expected 4 values, found 3"):
        fairness.strata(fairness.mean_of(np.ones(4)), {"race": ["a"] * 3}, list("1234"))
