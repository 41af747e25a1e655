"""What a run tells of itself while it runs: log lines with a verdict on collapse, and the online evaluation."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raddino_jax import augment, diagnostics, flops, hosts, logs
from raddino_jax.data import pipeline
from raddino_jax.models import vit

Array = jax.Array
Observe = Callable[[int, np.ndarray, Any], dict[str, float]]  # (step, class features [n, D], labels) -> scores


class Journal:
    """Reports steps: metrics.jsonl, the progress line, the warning when the diagnostics say collapse."""

    def __init__(self, config, workdir, constants, mesh, steps, start):
        views, chip = constants.views, flops.chip(mesh.devices.flat[0])
        per_image = flops.step(constants.objective, views.global_size, views.local_size, views.local_crops)
        self.meter = logs.Meter(config.batch_size, per_image, chip and chip.peak * 1e12 * mesh.size)
        self.metrics = logs.Silent() if hosts.index() else logs.Metrics(workdir, start)
        self.rows = rows_until(workdir, start)
        self.schedules, self.steps, self.every = constants.schedules, steps, config.log_every
        self.prototypes = constants.objective.dino_head.prototypes
        self.close = self.metrics.close

    def report(self, step: int, values: dict) -> None:
        """Log a step that is due. Raises FloatingPointError when its loss is no number."""
        values = {k: float(v) for k, v in values.items()}
        wrong = [f"{k} is {v}" for k, v in values.items() if k.startswith(("loss", "grad_norm")) and not np.isfinite(v)]
        if wrong:
            raise FloatingPointError(
                f"{', '.join(wrong)} at step {step}; the newest checkpoint holds the last good state, step {step - 1}, "
                f"and replay-{step}.json names the films of the batch. With --force, lower optim.base_lr, or set "
                "compute_dtype=float32 to see whether precision is the cause"
            )
        if step % self.every == 0 or step in (1, self.steps) or any(k.startswith("probe_") for k in values):
            schedule = {k: float(v) for k, v in self.schedules.at(step - 1).items()}
            self._log(step, {"step": step} | values | schedule | self.meter.rates())

    def _log(self, step: int, row: dict) -> None:
        self.rows.append(row)
        row["collapse"] = diagnostics.verdict(self.rows, self.prototypes)
        self.metrics.write(step, row)
        logs.say(logs.progress(step, self.steps, row))
        if row["collapse"] and not self.rows[-2].get("collapse"):
            logs.say(row["collapse"])


def rows_until(workdir, step: int) -> list[dict]:
    """The lines of metrics.jsonl that a start from a step's checkpoint goes on from."""
    return [row for row in logs.read_metrics(workdir) if row["step"] <= step]


class Best:
    """The best step by `config.keep_best`, and how many evaluations came after it."""

    def __init__(self, config, rows: list[dict]):
        """rows: lines of metrics.jsonl so far."""
        self.metric, self.patience = config.keep_best, config.stop_after
        self.value, self.step, self.since = -np.inf, None, 0
        for row in rows:
            self.note(row["step"], row)

    def note(self, step: int, scores: dict) -> None:
        """Count an evaluation; scores without the metric are none."""
        value = scores.get(self.metric)
        if value is None:
            return
        self.since += 1
        if value > self.value:
            self.value, self.step, self.since = value, step, 0

    @property
    def exhausted(self) -> bool:
        """Whether `config.stop_after` evaluations brought no gain."""
        return bool(self.patience) and self.since >= self.patience

    def __str__(self) -> str:
        return f"{self.metric} has not improved since step {self.step}"


def labelled(config, observe: Observe | None) -> tuple | None:
    """What `pipeline.labelled_films` finds for the online evaluation; None, with a word, where there is none to do."""
    if observe is None or not config.eval_every:
        return None
    found = pipeline.labelled_films(config.data, config.eval)
    if found is None:
        logs.say("online evaluation: none, the sources have no labels (config.eval.csv names a table)")
    return found


class Online:
    """The online evaluation: scores of the teacher, and the best of them so far."""

    def __init__(self, config, objective, labelled: tuple | None, observe: Observe | None, journal: Journal):
        """labelled: films with labels, None for no evaluation. journal: its lines tell a resumed run its best, its
        meter leaves evaluations out.
        """
        self.config, self.labelled, self.observe, self.meter = config, labelled, observe, journal.meter
        feature = vit.FEATURES[config.eval.feature]
        self.encode = jax.jit(lambda teacher, films: feature(objective.backbone.apply(
            {"params": teacher["backbone"]}, standardized(films, config)
        )))
        self.best, self.scores = Best(config, journal.rows), {}

    def evaluate(self, step: int, state) -> dict[str, float]:
        """Scores of this step where one is due, else nothing."""
        if self.labelled is None or step % self.config.eval_every:
            return {}
        began = time.perf_counter()
        films, labels, _ = self.labelled
        chunks = (np.stack(films[i : i + 64]) for i in range(0, len(films), 64))
        features = np.concatenate([np.asarray(self.encode(state.teacher, chunk)) for chunk in chunks])
        # Computed once: rounding may differ between hosts, and which checkpoint is best has to be one decision.
        self.scores = hosts.share("scores", None if hosts.index() else self.observe(step, features, labels))
        self.best.note(step, self.scores)
        self.meter.leave_out(time.perf_counter() - began)
        logs.say("  ".join([f"step {step}"] + [f"{name} {value:.3f}" for name, value in self.scores.items()]))
        return self.scores

    def metrics_of(self, step: int) -> dict | None:
        """What a checkpoint of this step is judged by."""
        return dict(self.scores) if self.scores and step == self.best.step else None


def standardized(films: Array, config) -> Array:
    """uint8 [n, H, W] -> normalised float32 [n, H, W, 1], as a view is but without augmentation."""
    x = films.astype(jnp.float32) / 255
    x = augment.standardize(x) if config.views.standardize else (x - config.data.mean) / config.data.std
    return x[..., None]
