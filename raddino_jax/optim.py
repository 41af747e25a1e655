"""Schedules and the optimiser: AdamW with per-parameter factors, clipped per module, and the EMA teacher.

Reference: DINOv2 `train/train.py`, `utils/param_groups.py`; arXiv 2401.10815, E.1. Step indices count from 0, as
the reference's schedules do: index i is used by the update that finishes step i + 1.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from raddino_jax import params as trees

Array = jax.Array


# --- schedules --------------------------------------------------------------------------------------


def cosine(index, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0):
    """Linear warm-up from `start` to `base`, then half a cosine down (or up) to `final`.

    The warm-up is inclusive of both ends, so index 0 gives `start` itself and `base` appears twice. From
    `total` on the value is `final`. index: int or integer array; numpy computes in float64.
    """
    xp = jnp if isinstance(index, Array) else np
    ramp = start + (base - start) * index / max(warmup - 1, 1)
    phase = xp.pi * (index - warmup) / max(total - warmup, 1)
    decay = final + 0.5 * (base - final) * (1 + xp.cos(phase))
    return xp.where(index < warmup, ramp, xp.where(index < total, decay, final))


def linear(index, start: float, final: float, total: int):
    """Straight line from `start` at index 0 to `final` at total - 1, then constant."""
    xp = jnp if isinstance(index, Array) else np
    ramp = start + (final - start) * index / max(total - 1, 1)
    return xp.where(index < total, ramp, final)


@dataclass(frozen=True)
class Schedules:
    """All scheduled values of a run; durations in steps.

    lr: (peak, final); weight_decay, momentum, teacher_temperature: (first, last). `total` is the horizon of the
    cosines. freeze_last_layer: steps in which the prototypes have learning rate 0. head_warmup: steps in
    which the backbone has.
    """

    total: int
    lr: tuple[float, float]
    lr_warmup: int
    weight_decay: tuple[float, float]
    momentum: tuple[float, float]
    teacher_temperature: tuple[float, float]
    teacher_temperature_warmup: int
    freeze_last_layer: int = 0
    head_warmup: int = 0

    def at(self, index) -> dict:
        """Every value at a step index: lr, last_layer_lr, backbone_lr, weight_decay, momentum, teacher_temp."""
        xp = jnp if isinstance(index, Array) else np
        lr = cosine(index, *self.lr, self.total, self.lr_warmup)
        return {
            "lr": lr,
            "last_layer_lr": xp.where(index < self.freeze_last_layer, 0.0, lr),
            "backbone_lr": xp.where(index < self.head_warmup, 0.0, lr),
            "weight_decay": cosine(index, *self.weight_decay, self.total),
            "momentum": cosine(index, *self.momentum, self.total),
            "teacher_temp": linear(index, *self.teacher_temperature, self.teacher_temperature_warmup),
        }


SCALING = {  # peak learning rate = base * factor(global batch)
    "none": lambda batch: 1.0,
    "sqrt_1024": lambda batch: (batch / 1024) ** 0.5,
    "linear_256": lambda batch: batch / 256,
}


def to_steps(duration, run_steps: int, batch_size: int, epoch_steps: float) -> int:
    """A duration (number, unit) in steps; unit: "steps", "epochs", "images" or "percent" of the run."""
    number, unit = duration
    per_unit = {"steps": 1.0, "epochs": epoch_steps, "images": 1 / batch_size, "percent": run_steps / 100}
    if unit not in per_unit:
        raise ValueError(f"duration {duration!r}: the unit must be one of {', '.join(per_unit)}")
    return int(round(number * per_unit[unit]))


# --- parameter groups -------------------------------------------------------------------------------


def lr_factors(names, depth: int, layer_decay: float, patch_embed_factor: float) -> dict[str, float]:
    """Learning-rate factor of each "module/parameter" name: layer_decay^(depth + 1 - layer).

    Layer 0 holds tokens, position and patch embedding (the latter times patch_embed_factor), layer i + 1
    block i; the final norm and the heads are not decayed.
    """
    first = layer_decay ** (depth + 1)
    rules = [(r"^backbone/patch_embed/", first * patch_embed_factor)]
    rules += [(r"^backbone/(cls_token|pos_embed|mask_token|register_tokens)$", first)]
    rules += [(rf"^backbone/blocks_{i}/", layer_decay ** (depth - i)) for i in range(depth)]
    rules += [(r"^backbone/norm/", 1.0), (r"^(dino|ibot)_head/", 1.0)]
    return trees.match(rules, names)


def decay_factors(names) -> dict[str, float]:
    """0 for biases, norms and LayerScale, 1 for the rest, tokens, position embedding and weight_g included."""
    return trees.match([(r"/bias$|norm\d?/|/gamma$", 0.0), (r"", 1.0)], names)


def is_last_layer(name: str) -> bool:
    """Whether the name is one of the prototypes (weight_g, weight_v)."""
    return re.search(r"/last_layer/", name) is not None


# --- the update ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled, scheduled weight decay: p <- p (1 - lr wd) - lr m / (sqrt(v) + eps).

    Every module (backbone, dino_head, ibot_head) is clipped by its own norm, the gradient of a frozen last layer
    included; a frozen parameter's moments keep running.
    """

    depth: int
    clip: float = 3.0
    layer_decay: float = 0.9
    patch_embed_factor: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @property
    def adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(*self.betas, eps=self.eps)

    def init(self, student: dict):
        """First and second moments and the step count."""
        return self.adam.init(student)

    def update(self, student: dict, grads: dict, state, schedule: dict) -> tuple[dict, object, dict]:
        """(student, optimiser state, gradient norm of each module before clipping)."""
        norms = {module: optax.tree.norm(tree) for module, tree in grads.items()}
        if self.clip:
            scale = {m: jnp.minimum(1.0, self.clip / (norm + 1e-6)) for m, norm in norms.items()}
            grads = {m: jax.tree.map(lambda g, s=scale[m]: g * s, tree) for m, tree in grads.items()}
        steps, state = self.adam.update(grads, state)
        return self._apply(student, steps, schedule), state, norms

    def _apply(self, student, steps, schedule):
        flat, steps = trees.flatten(student), trees.flatten(steps)
        lr_factor = lr_factors(flat, self.depth, self.layer_decay, self.patch_embed_factor)
        decay = decay_factors(flat)

        def move(name, p):
            lr = schedule[_learning_rate(name)] * lr_factor[name]
            return p - lr * (steps[name] + schedule["weight_decay"] * decay[name] * p)

        return trees.unflatten({name: move(name, p) for name, p in flat.items()})


def _learning_rate(name: str) -> str:
    if is_last_layer(name):
        return "last_layer_lr"
    return "backbone_lr" if name.startswith("backbone/") else "lr"


def ema(teacher: dict, student: dict, momentum: Array) -> dict:
    """teacher <- momentum * teacher + (1 - momentum) * student, for every parameter."""
    return jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, teacher, student)
