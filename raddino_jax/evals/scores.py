"""Scores of predictions, scikit-learn's, with gaps and degenerate classes said instead of averaged over; rows."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from raddino_jax import logs

SCORES = {"auprc": average_precision_score, "auroc": roc_auc_score}


def per_class(metric: str, truth: np.ndarray, predicted: np.ndarray, of=SCORES) -> np.ndarray:
    """The metric of each column of [n, C] arrays; NaN truth is masked, a class without both values gives NaN.

    of: SCORES, or QUICK for thousands of resamples.
    """
    return np.array([_one(of[metric], t, p) for t, p in zip(truth.T, predicted.T, strict=True)])


def _auprc(truth: np.ndarray, predicted: np.ndarray) -> float:
    found, wrong = _above(truth, predicted)
    return float(np.sum(np.diff(found, prepend=0) * found / (found + wrong)) / found[-1])


def _auroc(truth: np.ndarray, predicted: np.ndarray) -> float:
    found, wrong = _above(truth, predicted)
    area = np.trapezoid(np.append(0, found), np.append(0, wrong))
    return float(area / (found[-1] * wrong[-1]))


def _above(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives from the highest score down to each distinct one."""
    order = np.argsort(-predicted, kind="stable")
    ends = np.flatnonzero(np.diff(predicted[order], append=np.nan))
    found = np.cumsum(truth[order], dtype=np.float64)[ends]
    return found, ends + 1 - found


# The same numbers without scikit-learn's checks of its input: ten to forty times as fast on a few thousand films.
QUICK = {"auprc": _auprc, "auroc": _auroc}


def _one(score, truth, predicted) -> float:
    known = ~np.isnan(truth)
    if len(np.unique(truth[known])) < 2:
        return float("nan")
    return float(score(truth[known], predicted[known]))


def accuracy(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Share of right answers per class of [n, C] truth (NaN masked) and predicted probabilities."""
    right = np.where(np.isnan(truth), np.nan, (predicted > 0.5) == (truth > 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a class nobody assessed has no accuracy
        return np.nanmean(right, axis=0)


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of Student's confidence interval over repeats; the half width of one repeat is infinite."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("inf")
    half = stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def row(
    task: str, dataset: str, encoder: str, metric: str, name: str, values: Sequence[float], *,
    n: int, folds: int, seed, data: str, config: str = "config.json", **more,
) -> dict:
    """One row of results.json. name: its class; values: of each repeat, NaN where undefined; n: films judged.

    value and std are those of the defined repeats; interval is Student's 95 % one, None for a single repeat. A score
    that no repeat defines has value None and a "reason"; "undefined" counts repeats left out. more: further fields.
    """
    values = np.asarray(values, float)
    known = values[~np.isnan(values)]
    found = dict(
        task=task, dataset=dataset, encoder=encoder, metric=metric, value=None, std=None, interval=None, n=int(n),
        folds=int(folds), seed=seed, data=data, config=config, **{"class": name},
    ) | more
    if len(known):
        found["value"] = float(known.mean())
    if len(known) > 1:
        mean, half = interval(known)
        found |= {"std": float(known.std(ddof=1)), "interval": [mean - half, mean + half]}
    if len(known) < len(values):
        found["undefined"] = len(values) - len(known)
        found["reason"] = f"undefined in {len(values) - len(known)} of {len(values)} repeats: one class only"
    return found


def write_rows(workdir: Path, rows: Sequence[dict]) -> None:
    """Write results.json whole: rows of the same task, dataset and encoder are replaced, others kept."""
    path = Path(workdir) / "results.json"

    def whose(row):
        return row["task"], row["dataset"], row["encoder"]

    fresh = {whose(row) for row in rows}
    kept = [row for row in json.loads(path.read_text()) if whose(row) not in fresh] if path.exists() else []
    logs.write_whole(path, json.dumps([*kept, *rows], indent=1) + "\n")


def mean_of_defined(values: np.ndarray) -> float:
    """Mean over the classes that are defined; NaN where none is."""
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
