"""Scores of predictions, scikit-learn's, with gaps and degenerate classes said instead of averaged over."""

import warnings

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

SCORES = {"auprc": average_precision_score, "auroc": roc_auc_score}


def per_class(metric: str, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The metric of each column of [n, C] arrays; NaN truth is masked, a class without both values gives NaN."""
    return np.array([_one(SCORES[metric], t, p) for t, p in zip(truth.T, predicted.T, strict=True)])


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
