"""Training a head on films and masks: one step, and the run with its best state, which survives being killed.

The recipe is that of arXiv 2401.10815, E.3.2: Adam, cosine to 0, the state with the lowest validation loss. Batches,
deformations and dropout are keyed by (seed, step, place in the batch), so a resumed run is the run that was not killed.
Letters: n films, B of a batch, S pixels per side, C structures.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from raddino_jax import checkpoints, logs, loop, optim, sharding
from raddino_jax.data.shapes import IGNORE
from raddino_jax.evals import deform, dice
from raddino_jax.evals.heads import Head

Array = jax.Array


@dataclass(frozen=True)
class Films:
    """Films to learn from. inputs: levels uint8 [n, S, S], or features of them; masks uint8 [n, S, S, C]."""

    inputs: np.ndarray
    masks: np.ndarray
    featured: bool = False

    def take(self, index: np.ndarray) -> "Films":
        """The films of an index."""
        return Films(self.inputs[index], self.masks[index], self.featured)

    def __len__(self) -> int:
        return len(self.masks)


@flax.struct.dataclass
class State:
    """step: finished updates. variables: of the network. opt: Adam's moments."""

    step: Array
    variables: dict
    opt: Any


@dataclass
class Best:
    """The state with the lowest validation loss so far."""

    variables: dict
    loss: float = math.inf
    step: int = 0


@dataclass(frozen=True)
class Fit:
    """Constants of a training run. deformation: None leaves films as they are."""

    head: Head
    lr: float
    steps: int
    batch_size: int
    seed: int
    deformation: deform.Deformation | None = None

    @property
    def adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam()

    def fresh(self) -> State:
        """Step 0."""
        variables = self.head.init(jax.random.key(self.seed))
        return State(jnp.zeros((), jnp.int32), variables, self.adam.init(variables["params"]))

    def step(self, state: State, frozen: dict, inputs: Array, masks: Array, featured: bool) -> tuple[State, dict]:
        """One update. Returns (state, {"loss", "dice_loss", "bce", "lr"})."""
        key, dropout = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), state.step))
        if self.deformation is not None:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(inputs)))
            one = lambda key, film, mask: deform.deform(key, film, mask, self.deformation)  # noqa: E731
            inputs, masks = jax.vmap(one)(keys, inputs.astype(jnp.float32), masks)
        features = inputs if featured else self.head.features(frozen, inputs)

        def objective(params):
            logits, moved = self.head.train_logits(state.variables | {"params": params}, features, dropout)
            sums = dice.terms(logits, masks == 1, masks != IGNORE)
            return dice.loss(sums), (moved, sums)

        (total, (moved, sums)), grads = jax.value_and_grad(objective, has_aux=True)(state.variables["params"])
        lr = optim.cosine(state.step, self.lr, 0.0, self.steps)
        updates, opt = self.adam.update(grads, state.opt)
        params = jax.tree.map(lambda p, u: p - lr * u, state.variables["params"], updates)
        of = {name: value.sum() for name, value in sums.items()}
        metrics = {
            "loss": total, "dice_loss": of["dice"] / jnp.maximum(of["present"], 1),
            "bce": of["bce"] / jnp.maximum(of["counted"], 1), "lr": lr,
        }
        return State(state.step + 1, moved | {"params": params}, opt), metrics

    def validate(self, variables: dict, frozen: dict, inputs: Array, masks: Array, featured: bool) -> dict:
        """`dice.terms` of films as they are."""
        features = inputs if featured else self.head.features(frozen, inputs)
        return dice.terms(self.head.logits(variables, features), masks == 1, masks != IGNORE)


def steps_of(config, films: int) -> tuple[int, int]:
    """(steps, steps between two validations) of a run over so many films."""
    epoch = math.ceil(films / min(config.batch_size, films))
    steps = max(config.epochs * epoch, config.min_steps)
    return steps, config.eval_every or max(epoch, steps // 100)


def run(config, head: Head, train: Films, val: Films, seed: int, workdir: Path) -> dict | None:
    """Train to the end, from the newest sound checkpoint, and return the best variables; None when asked to stop."""
    steps, every = steps_of(config, len(train))
    deformation = deformation_of(config) if config.augment else None
    fit = Fit(head, config.lr, steps, min(config.batch_size, len(train)), seed, deformation)
    saved = checkpoints.Checkpoints(workdir, keep=2)
    try:
        return _run(config, fit, train, val, every, workdir, saved)
    finally:
        saved.close()


def deformation_of(config) -> deform.Deformation:
    """The fields of `config.deformation`."""
    given = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in config.deformation.items()}
    return deform.Deformation(**given)


def _run(config, fit: Fit, train, val, every, workdir, saved) -> dict | None:
    mesh = sharding.make_mesh(jax.local_devices())
    state = jax.device_put(fit.fresh(), NamedSharding(mesh, P()))
    best, start = Best(state.variables), saved.newest_sound() or 0
    if start:
        state, best = _restored(saved, start, state)
        logs.say(f"{workdir}: resumed from step {start} of {fit.steps}")
    if start >= fit.steps:
        return best.variables
    frozen = fit.head.frozen
    step = jax.jit(fit.step, static_argnames="featured", donate_argnums=0)
    validate = jax.jit(fit.validate, static_argnames="featured")
    metrics, meter = logs.Metrics(workdir, start), logs.Meter(fit.batch_size, 0.0, None)

    def evaluate(step, state):
        if step % every and step != fit.steps:
            return {}
        loss = _validation(validate, state.variables, frozen, val, fit.batch_size, mesh)
        if loss < best.loss:
            best.variables, best.loss, best.step = jax.tree.map(jnp.copy, state.variables), loss, step
        return {"val_loss": loss}

    def report(step, values):
        saved.check()
        logs.tell_step(metrics, meter, step, fit.steps, values, config.log_every, ("loss", "dice_loss"))

    with jax.set_mesh(mesh), loop.Terminated() as stop:  # attention on a TPU asks for the mesh
        _, last = loop.run(
            state, lambda state, batch: step(state, frozen, *batch, featured=train.featured),
            _batches(train, fit, start, mesh), start=start, steps=fit.steps, report=report,
            save=lambda step, state: saved.save(step, _items(state, best)), evaluate=evaluate, meter=meter,
            should_save=lambda step: step % config.checkpoint_every == 0, stop=lambda step: bool(stop),
        )
    metrics.close()
    if last < fit.steps:
        logs.say(f"asked to end: step {last} is saved; the same command continues")
        return None
    logs.say(f"best validation loss {best.loss:.4f} at step {best.step}")
    return best.variables


def _items(state: State, best: Best) -> dict:
    """A checkpoint: "teacher" is the best state, which evaluations read, "student" the newest."""
    rest = {"step": state.step, "best_loss": jnp.float32(best.loss), "best_step": jnp.int32(best.step)}
    return {"student": state.variables, "teacher": best.variables, "opt": state.opt, "rest": rest}


def _restored(saved, step: int, like: State) -> tuple[State, Best]:
    items = saved.restore(step, _items(like, Best(like.variables)))
    rest = items["rest"]
    best = Best(items["teacher"], float(rest["best_loss"]), int(rest["best_step"]))
    return State(rest["step"], items["student"], items["opt"]), best


def _batches(films: Films, fit: Fit, start: int, mesh) -> Iterator[tuple[Array, Array]]:
    for index in places(len(films), fit.batch_size, fit.seed, start, fit.steps):
        yield placed(films.take(index), mesh)


def places(n: int, batch_size: int, seed: int, start: int, steps: int) -> Iterator[np.ndarray]:
    """Batches of places among n, for steps start + 1 .. steps.

    Slot s of the run holds place s % n of epoch s // n, in that epoch's order.
    """
    orders = {}
    for step in range(start, steps):
        slots = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = np.unique(slots // n)
        orders = {e: orders.get(e, np.random.default_rng((seed, e)).permutation(n)) for e in epochs}
        yield np.array([orders[s // n][s % n] for s in slots])


def placed(films: Films, mesh) -> tuple[Array, Array]:
    """(inputs, masks) on the devices, split over them where their number divides the films."""
    split = sharding.batch_sharding(mesh) if len(films) % mesh.size == 0 else NamedSharding(mesh, P())
    return jax.device_put((films.inputs, films.masks), split)


def _validation(validate: Callable, variables, frozen, films: Films, batch_size: int, mesh) -> float:
    sums: dict[str, float] = {}
    for start in range(0, len(films), batch_size):
        part = films.take(np.arange(start, min(start + batch_size, len(films))))
        for name, value in validate(variables, frozen, *placed(part, mesh), featured=films.featured).items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
    return float(dice.loss({name: np.float64(value) for name, value in sums.items()}))
