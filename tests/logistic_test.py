"""Logistic regression in JAX against scikit-learn's, and against what defines the optimum."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from raddino_jax.evals import logistic
from raddino_jax.evals.logistic import Settings

TIGHT = dict(tol=1e-6, max_iter=2000)


def drawn(classes, n=203, width=12, seed=0):  # 203: no multiple of the eight devices
    """Features with an offset and unequal scales, and noisy classes."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, width)) * np.linspace(0.5, 3, width) + 2).astype(np.float32)
    y = ((x - 2) @ rng.normal(size=(width, classes)) + 3 * rng.gumbel(size=(n, classes))).argmax(1)
    return x, np.array(["class " + "abcde"[k] for k in y])


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("c", [1.0, 0.01])
def test_jax_agrees_with_sklearn(classes, c):
    """Probabilities within 1e-3 and predictions alike, both run until they converge."""
    x, y = drawn(classes)
    ours = logistic.fit(x, y, Settings(c=c, solver="jax", **TIGHT))
    theirs = LogisticRegression(C=c, **TIGHT).fit(x.astype(np.float64), y)
    assert list(ours.classes) == list(theirs.classes_) and ours.iterations > 1
    np.testing.assert_allclose(softmax(ours.logits(x), axis=1), theirs.predict_proba(x), atol=1e-3)
    assert (ours.predict(x) == theirs.predict(x)).mean() > 0.99


@pytest.mark.parametrize("solver", ["sklearn", "jax"])
def test_the_solution_is_where_the_objective_has_no_slope(solver):
    """The gradient of mean log loss + |w|^2 / (2 C n), written out in float64."""
    x, y = drawn(4)
    found = logistic.fit(x, y, Settings(c=0.5, solver=solver, **TIGHT))
    x = x.astype(np.float64)
    wrong = (softmax(found.logits(x), axis=1) - (y[:, None] == found.classes)) / len(x)
    slope = x.T @ wrong + found.coefficients / (0.5 * len(x))
    assert np.abs(slope).max() < 2e-4 and np.abs(wrong.sum(0)).max() < 2e-4
    loss = -log_softmax(found.logits(x), axis=1)[np.arange(len(x)), np.searchsorted(found.classes, y)].mean()
    assert loss < np.log(4) - 0.1  # better than nothing known


@pytest.mark.parametrize("solver", ["sklearn", "jax"])
def test_standardised_features_forget_their_scale_and_offset(solver):
    x, y = drawn(4)
    settings = Settings(solver=solver, standardize=True, **TIGHT)
    plain, moved = logistic.fit(x, y, settings), logistic.fit(x * 100 - 7, y, settings)
    np.testing.assert_allclose(softmax(plain.logits(x), 1), softmax(moved.logits(x * 100 - 7), 1), atol=2e-3)
    constant = np.column_stack([x, np.full(len(x), 5, np.float32)])
    assert np.isfinite(logistic.fit(constant, y, Settings(standardize=True, solver="sklearn")).coefficients).all()


def test_one_class_is_predicted_without_a_fit():
    x, _ = drawn(2)
    found = logistic.fit(x, np.array(["only"] * len(x)))
    assert set(found.predict(x)) == {"only"} and found.converged


def test_a_fit_that_is_cut_short_says_so():
    x, y = drawn(4)
    for solver in ("sklearn", "jax"):
        assert not logistic.fit(x, y, Settings(solver=solver, max_iter=2, tol=1e-6)).converged
        assert logistic.fit(x, y, Settings(solver=solver, **TIGHT)).converged


def test_auto_takes_jax_for_large_sets_alone():
    assert logistic.solver_of("auto", np.empty((48_000, 768), np.float32)) == "jax"  # MIMIC-CXR's, four fifths
    assert logistic.solver_of("auto", np.empty((300, 768), np.float32)) == "sklearn"
    assert logistic.solver_of("jax", np.empty((3, 2))) == "jax"
