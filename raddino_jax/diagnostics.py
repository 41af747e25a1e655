"""Is it learning? Measures of collapse in every log line, and the sentence that names the cause and the mend.

Collapse has three faces: targets that are uniform (nothing to match), targets that are all one prototype (everything
matches), features that no longer tell films apart. None of them shows in the loss alone.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from raddino_jax import losses

Array = jax.Array


def spread(features: Array, name: str) -> dict[str, Array]:
    """How different the rows of [n, D] are: {name}_rank and {name}_cosine.

    rank: participation ratio (tr C)^2 / tr(C C) of the covariance C, from 1 (a line) to min(n - 1, D): an effective
    rank without eigenvalues. cosine: mean over pairs of rows, 1 where all point the same way.
    """
    x = features.astype(jnp.float32)
    n = len(x)
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    cosine = (jnp.square(unit.sum(0)).sum() - n) / (n * (n - 1)) if n > 1 else jnp.ones(())
    centred = x - x.mean(0)
    scale = jnp.sqrt(jnp.square(centred).mean()) + 1e-30  # near-constant features must not underflow when squared
    covariance = jnp.einsum("nd,ne->de", centred / scale, centred / scale) / n
    rank = jnp.square(jnp.trace(covariance)) / (jnp.square(covariance).sum() + 1e-30)
    return {f"{name}_rank": rank, f"{name}_cosine": cosine}


def matching(student: Array, prototypes: Array, teacher: dict) -> dict[str, Array]:
    """What the teacher asks for and whether the student answers, on class tokens.

    student: unit vectors [n, b] in the order of teacher["rows"] [n, b]; prototypes: the student's [K, b].
    Returns target_entropy (nats, mean over rows; ln K is uniform), prototypes_used (exp of the entropy of the mean
    target, as a share of K) and agreement (share of rows whose strongest prototype is the same).
    """
    targets = losses.targets(teacher["rows"], teacher["prototypes"], teacher["temperature"], teacher["bias"])
    answers = jnp.einsum("nb,kb->nk", student, prototypes.astype(student.dtype))
    used = jnp.exp(_entropy(targets.mean(0))) / targets.shape[-1]
    agreement = (targets.argmax(-1) == answers.argmax(-1)).mean()
    return {"target_entropy": _entropy(targets).mean(), "prototypes_used": used, "agreement": agreement}


def _entropy(p: Array) -> Array:
    return -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1)


UNIFORM, FEW, SAME = 0.99, 2.0, 0.995  # share of ln K; prototypes; mean cosine of different films
LINE = 1.2  # effective rank of patch features that lie on a line
GRACE = 20  # steps in which heads may still be without signal
PATIENCE = 3  # log lines in a row


def verdict(rows: Sequence[dict], prototypes: int) -> str | None:
    """The likely cause and the mend when the last log lines say collapse, else None.

    rows: lines of metrics.jsonl, oldest first. A sign must hold for PATIENCE lines in a row.
    """
    recent = rows[-PATIENCE:]
    if len(recent) < PATIENCE or recent[0]["step"] < GRACE:
        return None
    return next((text for sign, text in SIGNS if all(sign(row, prototypes) for row in recent)), None)


def _uniform(row: dict, prototypes: int) -> bool:
    return row["target_entropy"] > UNIFORM * math.log(prototypes)


def _burnt(row: dict, prototypes: int) -> bool:
    return _uniform(row, prototypes) and _same(row, prototypes) and row["patch_rank"] < LINE


def _few(row: dict, prototypes: int) -> bool:
    return row["prototypes_used"] * prototypes < FEW


def _same(row: dict, prototypes: int) -> bool:
    return row["cls_cosine"] > SAME


SIGNS = [
    (_few, "COLLAPSE: every film gets the same target, so there is nothing left to learn. Likely cause: no working "
           "centring (loss.centring='sinkhorn', sinkhorn_iterations=3; with softmax centre_momentum below 1) or a "
           "learning rate far too high (lower optim.base_lr)"),
    (_burnt, "COLLAPSE: all features are the same, those of patches too, and the targets are uniform: the weights are "
             "spoilt. Likely cause: a learning rate far too high (lower optim.base_lr, lengthen optim.warmup) or no "
             "clipping (optim.clip)"),
    (_uniform, "COLLAPSE: the targets are uniform over the prototypes, so the DINO term teaches nothing. Likely cause: "
               "the teacher's temperature is too high for what the features can tell (lower both ends of "
               "optim.teacher_temperature), or the heads have no signal yet (fewer prototypes, larger layerscale, "
               "longer optim.head_warmup)"),
    (_same, "COLLAPSE: the class tokens of different films are all but the same. Likely cause: a learning rate too "
            "high (lower optim.base_lr, lengthen optim.warmup) or KoLeo switched off (loss.koleo)"),
]
