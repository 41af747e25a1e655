"""Any score told apart by groups of patients: how many, the value, its interval, all together, and who fares worst.

The paper reports the average over all films and the worst group (arXiv 2401.10815, 3.5). A group's number without how
many patients it rests on says little, so both stand beside it: counts, and a 95 % interval from drawing patients anew.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

RESAMPLES = 500
UNKNOWN = ("", "nan", "None")  # films without a group count in "all" alone


def strata(
    score: Callable[[np.ndarray], float],
    columns: Mapping[str, Sequence],
    patients: Sequence,
    *,
    smallest: int = 2,
    lower_is_better: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict]:
    """Fields of rows of results.json, to be merged with what else a row says.

    score: index of films [m], repeats allowed -> value, NaN where it is undefined. columns: name -> group of each film.
    smallest: patients below which a group is listed, but cannot be the worst: one patient has no interval.
    Each column gives "COLUMN=GROUP" rows, "COLUMN: all" over every film, and "COLUMN: worst", whose fields "worst" and
    "gap" name the group and say how far it lies from all. Raises ValueError for a column of another length.
    """
    patients = np.asarray(patients)
    rows = []
    for column, values in columns.items():
        groups = np.array([str(value).strip() for value in values])
        if len(groups) != len(patients):
            raise ValueError(f"strata {column!r}: expected {len(patients)} values, found {len(groups)}")
        names = [name for name in np.unique(groups) if name not in UNKNOWN]
        found = [_row(f"{column}={name}", score, np.flatnonzero(groups == name), patients, resamples, seed)
                 for name in names]
        everyone = _row(f"{column}: all", score, np.arange(len(patients)), patients, resamples, seed)
        rows += [*found, everyone, *_worst(column, found, everyone, smallest, lower_is_better)]
    return rows


def _row(stratum: str, score, index: np.ndarray, patients: np.ndarray, resamples: int, seed: int) -> dict:
    names, member = np.unique(patients[index], return_inverse=True)
    value = float(score(index))
    row = {"stratum": stratum, "value": value, "std": None, "interval": None, "n": len(index), "patients": len(names)}
    if np.isnan(value):
        return row | {"value": None, "reason": f"the score is undefined for these {len(index)} films"}
    if len(names) > 1:
        drawn = _resampled(score, index, member, len(names), resamples, seed)
        if len(drawn) > 1:
            row["std"] = float(drawn.std(ddof=1))
            row["interval"] = [float(edge) for edge in np.percentile(drawn, (2.5, 97.5))]
    return row


def _resampled(score, index, member, count: int, resamples: int, seed: int) -> np.ndarray:
    """Scores of resamples of patients with all their films; those where the score is undefined are left out."""
    films = np.split(index[np.argsort(member, kind="stable")], np.cumsum(np.bincount(member, minlength=count))[:-1])
    rng = np.random.default_rng(seed)
    values = (score(np.concatenate([films[i] for i in rng.integers(0, count, count)])) for _ in range(resamples))
    return np.array([value for value in values if not np.isnan(value)])


def _worst(column: str, found: list[dict], everyone: dict, smallest: int, lower_is_better: bool) -> list[dict]:
    sound = [row for row in found if row["value"] is not None and row["patients"] >= smallest]
    if not sound or everyone["value"] is None:
        return []
    worst = (max if lower_is_better else min)(sound, key=lambda row: row["value"])
    gap = abs(everyone["value"] - worst["value"])
    return [worst | {"stratum": f"{column}: worst", "worst": worst["stratum"], "gap": gap}]


def mean_of(values: np.ndarray) -> Callable[[np.ndarray], float]:
    """The score that is a mean of one value per film, NaN left out: accuracy, Dice, ROUGE-L."""
    def score(index: np.ndarray) -> float:
        chosen = values[index]
        known = ~np.isnan(chosen)
        return float(chosen[known].mean()) if known.any() else float("nan")

    return score
