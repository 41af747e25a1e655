"""A linear probe on films that vary: each step turns, crops and exposes its films anew and encodes them, on the device.

Letters: n films, S pixels per side, B of a batch, D width, C classes, R repeats, L learning rates.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from raddino_jax import augment, logs, sharding
from raddino_jax.evals import deform, fast, features, frames, heads
from raddino_jax.evals.splits import Split
from raddino_jax.models import vit

Array = jax.Array


@dataclass(frozen=True)
class Variation:
    """How films vary, hi-ml's numbers; noise: standard deviation in units of white, with a chance of `noisy`."""

    rotation: float = 30.0
    shear: float = 15.0
    scale: tuple[float, float] = (0.8, 1.0)  # of the area that a crop keeps
    flip: float = 0.5
    gamma: tuple[float, float] = (0.5, 1.5)
    brightness: float = 0.2
    contrast: float = 0.2
    noise: float = 0.05
    noisy: float = 0.5


def vary(key: Array, film: Array, settings: Variation) -> Array:
    """A film, levels float32 [S, S], turned, cropped, mirrored, under another exposure, with noise."""
    s = settings
    turn, crop, mirror, grain = jax.random.split(key, 4)
    moved = deform.Deformation(
        affine=1.0, rotation=s.rotation, shear=s.shear, elastic=0.0, flip=0.0, gamma=s.gamma,
        brightness=s.brightness, contrast=s.contrast,
    )  # fmt: skip
    film, _ = deform.deform(turn, film, jnp.zeros((*film.shape, 0), jnp.uint8), moved)
    box = augment.crop_box(
        jax.random.uniform(crop, (4, augment.CROP_TRIES)), film.shape, jnp.array(s.scale), (3 / 4, 4 / 3), "area"
    )
    film = augment.resized_crop(film, box, film.shape[0], jax.random.uniform(mirror) < s.flip)
    chance, noise = jax.random.split(grain)
    strength = 255 * s.noise * (jax.random.uniform(chance) < s.noisy)
    return jnp.clip(film + strength * jax.random.normal(noise, film.shape), 0, 255)


def fit(
    films: features.Films, y: np.ndarray, cut: Sequence[Split], encoder, x: np.ndarray, config, recipe: fast.Recipe
) -> dict[str, np.ndarray]:
    """As `fast.fit`, but every step sees its films varied anew and encodes them; repeats one after the other.

    y: labels [n, C], NaN where not assessed. x: features [n, D] of the films as they are, for standardising.
    config: `variation`, `feature` and `features_dir` of configs/probe.py.
    """
    about = {"preprocess": repr(encoder.settings)}

    def framed(film):
        return frames.framed(film, encoder.settings, "crop")[0]

    levels = features.squares(films, framed, about, config.features_dir)
    step = encoder.compiled(_step(config, encoder, recipe), donate_argnums=0)
    plans = [fast.plan(x, split.train, recipe, k, encoder.mesh.size) for k, split in enumerate(cut)]
    found = [
        _fit_one(f"{k}/{len(cut)}", encoder, y, levels, recipe, step, plan) for k, plan in enumerate(plans, start=1)
    ]
    return {name: np.stack([layers[name] for layers in found]) for name in found[0]}


def _step(config, encoder, recipe: fast.Recipe):
    given = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in config.variation.items()}
    variation = Variation(**given)
    frozen_head = heads.Head(None, encoder.settings, None)  # levels to what the network reads

    def step(states, frozen, levels, y, here, plan, lrs, number):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(jax.random.fold_in(plan.key, 1), number), jnp.arange(len(levels))
        )
        films = jax.vmap(lambda key, film: vary(key, film, variation))(keys, levels.astype(jnp.float32))
        found = vit.FEATURES[config.feature](encoder._features(frozen, frozen_head.features({}, films)))
        z = (jax.lax.stop_gradient(found).astype(jnp.float32) - plan.mean) / plan.scale
        return jax.vmap(lambda state, lr: fast.update(state, z, y, here, lr, number, plan.steps, recipe))(states, lrs)

    return step


def _fit_one(repeat: str, encoder, y, levels, recipe: fast.Recipe, step, plan: fast.Plan) -> dict:
    rows, everywhere = sharding.batch_sharding(encoder.mesh), NamedSharding(encoder.mesh, P())
    first = fast.start(plan.key, len(plan.mean), y.shape[1], recipe)
    states = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(recipe.lrs), axis=0), first)
    states, lrs = jax.device_put(states, everywhere), jnp.array(recipe.lrs)
    constant = jax.device_put(plan._replace(order=None), everywhere)
    began = told = time.perf_counter()
    for number, index in enumerate(plan.order):
        batch = [levels[index.clip(0)], y[index.clip(0)], index >= 0]
        batch = [jax.device_put(part, rows) for part in batch]
        states = step(states, encoder.params, *batch, constant, lrs, jnp.int32(number))
        if (now := time.perf_counter()) - told > 10:
            jax.block_until_ready(states)
            now = told = time.perf_counter()
            done = number + 1
            logs.say(f"probe: repeat {repeat}, step {done}/{len(plan.order)}, "
                     f"eta {logs.duration((now - began) * (len(plan.order) - done) / done)}")
    layers = {name: np.asarray(value) for name, value in states.params.items()}
    return layers | {"mean": plan.mean, "scale": plan.scale}
