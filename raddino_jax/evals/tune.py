"""Tuning the model that writes: one update, and the run that survives being killed.

The recipe is that of arXiv 2401.10815, E.3.3, and of LLaVA v1.5: AdamW, warm-up and cosine to 0, clipped by the global
norm; the loss is the mean over all learned tokens of the whole batch. Parameters, gradients and moments are float32 and
spread over the mesh; what is held (a frozen encoder, with LoRA the language model) has neither gradients nor moments.
Letters: n texts, S pixels per side, P patches of a film, C width of the encoder, T tokens.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from raddino_jax import checkpoints, hosts, logs, loop, sharding
from raddino_jax.evals.writer import Writer
from raddino_jax.models import llava

Array = jax.Array


@flax.struct.dataclass
class State:
    """step: finished updates. trained, held: parameters by `Writer.split`. opt: AdamW's moments of `trained`."""

    step: Array
    trained: dict
    held: dict
    opt: Any

    @property
    def params(self) -> dict:
        """All parameters of the writer."""
        return self.trained | self.held


@dataclass(frozen=True)
class Tune:
    """Constants of a run. encode: (frozen parameters, levels uint8 [n, S, S]) -> patches [n, P, C]; None where batches
    bring "features". warmup: share of the steps. accumulate: parts of a batch that are computed one after the other.
    """

    writer: Writer
    encode: Callable | None
    lr: float
    warmup: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    steps: int
    accumulate: int = 1

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW on clipped gradients, under the schedule of Hugging Face's Trainer: the first update has rate 0."""
        return optax.adamw(self.schedule, *self.betas, weight_decay=self.weight_decay)

    @property
    def schedule(self) -> Callable[[Array], Array]:
        """Index of an update, from 0 -> learning rate."""
        warmup = math.ceil(self.warmup * self.steps)
        return optax.warmup_cosine_decay_schedule(0.0, self.lr, warmup, max(self.steps, warmup + 1))

    def fresh(self, params: dict) -> State:
        """Step 0."""
        trained, held = self.writer.split(params)
        return State(jnp.zeros((), jnp.int32), trained, held, self.optimizer.init(trained))

    def loss(self, trained: dict, held: dict, frozen: dict, batch: dict) -> Array:
        """Sum over the learned tokens of a batch."""
        features = batch["features"] if self.encode is None else self.encode(frozen, batch["images"])
        return self.writer.loss(trained | held, features, batch)[0]

    def step(self, state: State, frozen: dict, batch: dict) -> tuple[State, dict]:
        """One update by a global batch. Returns (state, {"loss", "lr", "grad_norm"})."""
        count = jnp.maximum(_learned(batch), 1)
        total, grads = self._gradient(state, frozen, batch)
        grads = jax.tree.map(lambda g: g / count, grads)
        norm = optax.tree.norm(grads)
        if self.clip:
            factor = jnp.minimum(1.0, self.clip / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * factor, grads)
        updates, opt = self.optimizer.update(grads, state.opt, state.trained)
        metrics = {"loss": total / count, "lr": self.schedule(state.step), "grad_norm": norm}
        after = state.replace(step=state.step + 1, trained=optax.apply_updates(state.trained, updates), opt=opt)
        return after, metrics

    def _gradient(self, state: State, frozen: dict, batch: dict) -> tuple[Array, dict]:
        """Sums over the whole batch, in `accumulate` parts that each have texts of every device."""
        gradient = jax.value_and_grad(self.loss)
        if self.accumulate == 1:
            return gradient(state.trained, state.held, frozen, batch)
        parts = jax.tree.map(lambda x: x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, gradient(state.trained, state.held, frozen, part)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trained))
        return jax.lax.scan(add, zero, parts)[0]


def _learned(batch: dict) -> Array:
    return jnp.sum(llava.targets(batch["labels"]) != llava.IGNORED)


def jit_step(tune: Tune, state: State, frozen: dict, mesh) -> Callable:
    """step(state, frozen, batch), compiled for the mesh, its state donated."""
    places = sharding.shardings(state, mesh)
    return jax.jit(
        tune.step,
        in_shardings=(places, sharding.shardings(frozen, mesh), sharding.batch_sharding(mesh)),
        out_shardings=(places, NamedSharding(mesh, P())), donate_argnums=0,
    )  # fmt: skip


def run(
    config, tune: Tune, params: dict, frozen: dict, batches: Callable[[int], Iterator[dict]], workdir: Path,
    val: Callable[[], Iterator[dict]] | None = None, beat: Callable[[int, str], None] = lambda step, doing: None,
) -> dict | None:  # fmt: skip
    """Train to the end, from the newest sound checkpoint. Returns all parameters; None when asked to stop.

    Of several processes all call it. config: `batch_size`, `log_every`, `checkpoint_every`, `eval_every` and `mesh` of
    configs/report.py. batches(step): this process's rows of the batches of steps step + 1 on, as numpy arrays; val():
    those of the validation part, whose loss is logged every `eval_every` steps. beat: as of `loop.run`. Raises
    FloatingPointError where a loss or a gradient is no number.
    """
    saved = checkpoints.Checkpoints(workdir, keep=2)
    try:
        return _run(config, tune, params, frozen, batches, workdir, val, beat, saved)
    finally:
        saved.close()


def mesh_of(config):
    """All devices of all processes; parameters are spread over `config.mesh.fsdp` of them, 0 for all."""
    devices = jax.devices()
    return sharding.make_mesh(devices, config.mesh.fsdp or len(devices))


def _run(config, tune: Tune, params, frozen, batches, workdir: Path, val, beat, saved) -> dict | None:
    mesh, start = mesh_of(config), saved.newest_sound() or 0
    state = tune.fresh(sharding.place(params, mesh))
    state = jax.device_put(state, sharding.shardings(state, mesh))
    if start:
        state = _restored(saved, start, state)
        logs.say(f"{workdir}: resumed from step {start} of {tune.steps}")
    if start >= tune.steps:
        return state.params
    frozen = sharding.place(frozen, mesh)
    step, loss = jit_step(tune, state, frozen, mesh), jax.jit(partial(_sums, tune))
    metrics = logs.Metrics(workdir, start) if hosts.index() == 0 else None
    meter = logs.Meter(config.batch_size, 0.0, None)

    def evaluate(number: int, state: State) -> dict:
        if val is None or not config.eval_every or (number % config.eval_every and number != tune.steps):
            return {}
        sums = [loss(state, frozen, sharding.to_devices(batch, mesh)) for batch in val()]
        return {"val_loss": float(sum(total for total, _ in sums) / sum(count for _, count in sums))}

    def report(number: int, values: dict) -> None:
        saved.check()
        logs.tell_step(metrics, meter, number, tune.steps, values, config.log_every, ("loss",), "reports")

    # Networks ask for the mesh: attention on a TPU, weights that travel.
    with jax.set_mesh(mesh), loop.Terminated() as stop:
        state, last = loop.run(
            state, lambda state, batch: step(state, frozen, batch),
            (sharding.to_devices(batch, mesh) for batch in batches(start)), start=start, steps=tune.steps,
            report=report, save=lambda number, state: saved.save(number, _items(state)), evaluate=evaluate, meter=meter,
            should_save=lambda number: number % config.checkpoint_every == 0,
            stop=lambda number: hosts.ends_at(number, bool(stop)), beat=beat,
        )  # fmt: skip
    if metrics is not None:
        metrics.close()
    if last < tune.steps:
        logs.say(f"asked to end: step {last} is saved; the same command continues")
        return None
    return state.params


def _sums(tune: Tune, state: State, frozen: dict, batch: dict) -> tuple[Array, Array]:
    return tune.loss(state.trained, state.held, frozen, batch), _learned(batch)


def _items(state: State) -> dict:
    """A checkpoint. What is held is where the run began, and not saved."""
    return {"student": state.trained, "opt": state.opt, "rest": {"step": state.step}}


def _restored(saved, step: int, like: State) -> State:
    items = saved.restore(step, _items(like))
    return like.replace(step=items["rest"]["step"], trained=items["student"], opt=items["opt"])
