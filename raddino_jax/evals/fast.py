"""Linear layers trained on frozen features: every repeat and every learning rate at once, as if one by one.

Recipe: arXiv 2401.10815, E.3.1. AdamW, cosine to 0 over the run, a sigmoid per class, the mean of the binary cross
entropies of what is labelled in the batch, the last state.
Letters: n films, B of a batch, D width, C classes, R repeats, L learning rates.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from raddino_jax import logs
from raddino_jax.evals.splits import Split

Array = jax.Array
CHUNK = 500  # steps between two looks at the clock


@dataclass(frozen=True)
class Recipe:
    """Constants of a training run; lrs: tried beside each other."""

    lrs: tuple[float, ...] = (5e-5,)
    epochs: int = 100
    batch_size: int = 96
    weight_decay: float = 0.01
    standardize: bool = False
    seed: int = 0


class Plan(NamedTuple):
    """What a repeat learns from. order: films int32 [steps, B], -1 for none; steps: updates; mean, scale [D]; key."""

    order: np.ndarray
    steps: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    key: Array


class State(NamedTuple):
    """params: of the layer; opt: AdamW's moments."""

    params: dict
    opt: Any


def layer(classes: int) -> nn.Dense:
    """The layer, with PyTorch's initial weights: uniform within 1 / sqrt(D)."""
    return nn.Dense(classes, kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))


def plan(x: np.ndarray, train: np.ndarray, recipe: Recipe, repeat: int, multiple: int = 1) -> Plan:
    """A repeat on films `train` of features [n, D]; every epoch in a new order. multiple: of which B is made one."""
    size = -(-recipe.batch_size // multiple) * multiple
    per_epoch = -(-len(train) // recipe.batch_size)
    order = np.full((recipe.epochs, per_epoch, size), -1, np.int32)
    for epoch in range(recipe.epochs):
        shuffled = np.random.default_rng((recipe.seed, repeat, epoch)).permutation(train)
        short = per_epoch * recipe.batch_size - len(train)
        batches = np.concatenate([shuffled, np.full(short, -1)]).reshape(per_epoch, recipe.batch_size)
        order[epoch, :, : recipe.batch_size] = batches
    mean, scale = np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32)
    if recipe.standardize:
        mean, deviation = x[train].mean(0), x[train].std(0)
        scale = np.where(deviation > 1e-6, deviation, 1).astype(np.float32)
    key = jax.random.fold_in(jax.random.key(recipe.seed), repeat)
    return Plan(order.reshape(-1, size), np.int32(recipe.epochs * per_epoch), mean, scale, key)


def start(key: Array, width: int, classes: int, recipe: Recipe) -> State:
    """Step 0; the same for every learning rate."""
    params = layer(classes).init(key, jnp.zeros((1, width)))["params"]
    return State(params, _adamw(recipe).init(params))


def _adamw(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW without its learning rate, which differs between the runs of a batch."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(recipe.weight_decay))


def loss(params: dict, z: Array, y: Array, here: Array) -> Array:
    """Mean binary cross entropy over the labels that are known, y [B, C] with NaN, of films that are here [B]."""
    known = ~jnp.isnan(y) & here[:, None]
    entropies = optax.sigmoid_binary_cross_entropy(layer(y.shape[1]).apply({"params": params}, z), jnp.nan_to_num(y))
    return jnp.where(known, entropies, 0).sum() / jnp.maximum(known.sum(), 1)


def update(state: State, z: Array, y: Array, here: Array, lr, step, steps, recipe: Recipe) -> State:
    """One step of the cosine on standardised features z [B, D]; the state as it was from step `steps` on."""
    updates, opt = _adamw(recipe).update(jax.grad(loss)(state.params, z, y, here), state.opt, state.params)
    rate = lr * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
    new = State(jax.tree.map(lambda p, u: p - rate * u, state.params, updates), opt)
    return jax.tree.map(lambda a, b: jnp.where(step < steps, a, b), new, state)


@functools.partial(jax.jit, static_argnames="recipe", donate_argnums=0)
def _advance(states: State, x: Array, y: Array, plans: Plan, lrs: Array, first: Array, recipe: Recipe) -> State:
    """Steps `first` .. of all runs [R, L]; plans.order has these steps alone."""

    def run(state, plan, lr):
        def one(state, inputs):
            index, step = inputs
            z = (x[index.clip(0)] - plan.mean) / plan.scale
            return update(state, z, y[index.clip(0)], index >= 0, lr, step, plan.steps, recipe), None

        return jax.lax.scan(one, state, (plan.order, first + jnp.arange(len(plan.order))))[0]

    over_rates = jax.vmap(run, (0, None, 0))
    return jax.vmap(over_rates, (0, 0, None))(states, plans, lrs)


def fit(x: np.ndarray, y: np.ndarray, splits: Sequence[Split], recipe: Recipe, repeats: Sequence[int] = ()) -> dict:
    """Train on features [n, D] and labels [n, C] -> {"kernel" [R, L, D, C], "bias" [R, L, C], "mean", "scale" [R, D]}.

    repeats: the number of each split where they are not 0, 1, ...: what its order and its start are drawn by.
    """
    numbers = repeats or range(len(splits))
    plans = [plan(x, split.train, recipe, k) for split, k in zip(splits, numbers, strict=True)]
    last = max(int(p.steps) for p in plans)
    chunk_steps = min(CHUNK, last)
    longest = -(-last // chunk_steps) * chunk_steps
    orders = np.stack([np.pad(p.order, ((0, longest - len(p.order)), (0, 0)), constant_values=-1) for p in plans])
    together = Plan(None, *(jnp.stack([getattr(p, name) for p in plans]) for name in Plan._fields[1:]))
    lrs, x, y = jnp.array(recipe.lrs), jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    one = jax.vmap(lambda key: start(key, x.shape[1], y.shape[1], recipe))(together.key)
    states = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], len(lrs), axis=1), one)
    began = told = time.perf_counter()
    for first in range(0, longest, chunk_steps):
        chunk = together._replace(order=jnp.asarray(orders[:, first : first + chunk_steps]))
        states = jax.block_until_ready(_advance(states, x, y, chunk, lrs, jnp.int32(first), recipe))
        now = time.perf_counter()
        if now - told > 10:
            done, told = min(first + chunk_steps, last), now
            logs.say(f"probe: step {done}/{last} of {len(plans)} x {len(lrs)} runs, eta "
                     f"{logs.duration((now - began) * (last - done) / done)}")
    return {name: np.asarray(value) for name, value in states.params.items()} | {
        "mean": np.asarray(together.mean), "scale": np.asarray(together.scale)
    }


def logits(layers: dict, repeat: int, rate: int, x: np.ndarray) -> np.ndarray:
    """What one of the trained layers says [n, C] of features [n, D]."""
    z = (x - layers["mean"][repeat]) / layers["scale"][repeat]
    return z @ layers["kernel"][repeat, rate] + layers["bias"][repeat, rate]
