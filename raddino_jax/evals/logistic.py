"""Multinomial logistic regression on frozen features: scikit-learn's, and the same in JAX for sets that it is slow on.

Both minimise, over coefficients w and intercepts b,
    mean of -log p(class of the film) + |w|^2 / (2 C n),
with one vector of coefficients for two classes and one per class for more, by L-BFGS from zero until no element of the
gradient is larger than `tol`. In JAX the films lie spread over the devices and the fit is one compiled loop.
Letters: n films, D width, K classes.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from raddino_jax import sharding

Array = jax.Array

SOLVERS = ("auto", "sklearn", "jax")
LARGE = 2e7  # numbers in the features from which "auto" takes JAX


@dataclass(frozen=True)
class Settings:
    """c: inverse strength of the penalty. max_iter, tol: when L-BFGS ends. Defaults are scikit-learn's."""

    c: float = 1.0
    max_iter: int = 100
    tol: float = 1e-4
    standardize: bool = False  # features to mean 0 and deviation 1 of the train part
    solver: str = "auto"


class Fitted(NamedTuple):
    """coefficients [D, K] and intercepts [K] of the logits, the class of each column, and how the fit went."""

    coefficients: np.ndarray
    intercepts: np.ndarray
    classes: np.ndarray
    iterations: int
    converged: bool

    def logits(self, x: np.ndarray) -> np.ndarray:
        """[n, K] of features [n, D]."""
        return x @ self.coefficients + self.intercepts

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The likeliest class of each film."""
        return self.classes[self.logits(x).argmax(1)]


def fit(x: np.ndarray, y: np.ndarray, settings: Settings = Settings()) -> Fitted:
    """Features float [n, D] and classes [n] of the train part -> coefficients that apply to features as they are."""
    classes, index = np.unique(y, return_inverse=True)
    x = np.asarray(x, np.float32)
    if len(classes) == 1:
        return Fitted(np.zeros((x.shape[1], 1)), np.zeros(1), classes, 0, True)
    mean, scale = np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32)
    if settings.standardize:
        mean, deviation = x.mean(0), x.std(0)
        scale = np.where(deviation > 0, deviation, 1)  # a constant feature says nothing, at any scale
    solve = SOLVE["jax" if solver_of(settings.solver, x) == "jax" else "sklearn"]
    w, b, iterations, converged = solve((x - mean) / scale, index, len(classes), settings)
    w = w / scale[:, None]
    return Fitted(w, b - mean @ w, classes, iterations, converged)


def solver_of(name: str, x: np.ndarray) -> str:
    """The solver that a name stands for, given the features."""
    return name if name != "auto" else "jax" if x.size > LARGE else "sklearn"


def _sklearn(x, y, classes: int, settings: Settings):
    model = LogisticRegression(C=settings.c, max_iter=settings.max_iter, tol=settings.tol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caller is told by `converged`
        model.fit(x, y)
    iterations = int(model.n_iter_.max())
    return *_columns(model.coef_.T, model.intercept_), iterations, iterations < settings.max_iter


def _jax(x, y, classes: int, settings: Settings):
    # The intercept is free, so centred features have the same solution, which is reached in fewer steps.
    centre = x.mean(0)
    x = x - centre
    mesh = sharding.make_mesh(jax.local_devices())
    spare = -len(x) % mesh.size
    weights = np.pad(np.ones(len(x), np.float32), (0, spare))
    x, y = np.pad(x, ((0, spare), (0, 0))), np.pad(y, (0, spare))
    x, y, weights = (jax.device_put(part, sharding.batch_sharding(mesh)) for part in (x, y, weights))
    free = classes if classes > 2 else 1
    limits = (settings.c, settings.tol, settings.max_iter)
    (w, b), iterations, slope = _minimise(x, y, weights, *limits, free)
    w = np.asarray(w)
    return *_columns(w, np.asarray(b) - centre @ w), int(iterations), bool(slope <= settings.tol)


def _columns(w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One column per class; of two classes only the second has coefficients."""
    return (w, b) if w.shape[1] > 1 else (np.pad(w, ((0, 0), (1, 0))), np.pad(b, (1, 0)))


@functools.partial(jax.jit, static_argnames="free")
def _minimise(x: Array, y: Array, weights: Array, c, tol, max_iter, free: int):
    """L-BFGS over (w [D, free], b [free]); films of weight 0 take no part. The parameters, steps, largest slope."""
    total = weights.sum()

    def objective(parameters):
        w, b = parameters
        logits = x @ w + b
        logits = jnp.pad(logits, ((0, 0), (1, 0))) if free == 1 else logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return (losses * weights).sum() / total + (w**2).sum() / (2 * c * total)

    # More history than scikit-learn's 10: a product of history is cheap beside one with the films.
    solver = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def slope(state):
        return optax.tree.max(jax.tree.map(jnp.abs, optax.tree.get(state, "grad")))

    def going(carry):
        _, state = carry
        count = optax.tree.get(state, "count")
        return (count == 0) | ((count < max_iter) & (slope(state) > tol))

    def step(carry):
        parameters, state = carry
        value, gradient = value_and_grad(parameters, state=state)
        updates, state = solver.update(
            gradient, state, parameters, value=value, grad=gradient, value_fn=objective
        )
        return optax.apply_updates(parameters, updates), state

    start = (jnp.zeros((x.shape[1], free)), jnp.zeros(free))
    parameters, state = jax.lax.while_loop(going, step, (start, solver.init(start)))
    return parameters, optax.tree.get(state, "count"), slope(state)


SOLVE = {"sklearn": _sklearn, "jax": _jax}
