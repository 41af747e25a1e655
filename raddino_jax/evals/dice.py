"""Overlap of predicted and true masks: the loss that heads learn by, and Dice of cases with its summary.

Dice is 2 |A and B| / (|A| + |B|). As in arXiv 2401.10815 (Table 4) a film counts for a structure only if it has it,
structures are averaged within a film first, and mean and standard deviation are those over films; what is predicted
where there is nothing is told apart. Pixels that nobody annotated take no part.
Letters: n films, C structures, H W pixels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from raddino_jax.data.shapes import IGNORE

Array = jax.Array

RESAMPLES = 1000
SMOOTH = 1e-5  # added to numerator and denominator of the soft Dice


def terms(logits: Array, masks: Array, known: Array) -> dict[str, Array]:
    """Sums over the structures of each film: "dice" of 1 - soft Dice where present, "present", "bce", "counted" [n].

    logits float [n, H, W, C]; masks and known bool, alike. The loss of many films is `loss` of these, added up: it does
    not depend on how they were batched.
    """
    logits, known = logits.astype(jnp.float32), known.astype(jnp.float32)
    truth = masks.astype(jnp.float32) * known
    predicted = jax.nn.sigmoid(logits) * known
    pixels = (1, 2)
    overlap = 2 * (truth * predicted).sum(pixels) + SMOOTH
    dice = overlap / (truth.sum(pixels) + predicted.sum(pixels) + SMOOTH)
    cross = jnp.maximum(logits, 0) - logits * truth + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    seen = known.sum(pixels)
    cross = (cross * known).sum(pixels) / jnp.maximum(seen, 1)
    present, counted = truth.any(pixels).astype(jnp.float32), (seen > 0).astype(jnp.float32)
    return {
        "dice": ((1 - dice) * present).sum(-1), "present": present.sum(-1),
        "bce": (cross * counted).sum(-1), "counted": counted.sum(-1),
    }


def loss(sums: dict[str, Array]):
    """Mean of 1 - soft Dice over what is there, plus mean binary cross-entropy over what is annotated."""
    of = {name: value.sum() for name, value in sums.items()}
    return of["dice"] / jnp.maximum(of["present"], 1) + of["bce"] / jnp.maximum(of["counted"], 1)


def dice(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Dice [C] of bool [C, H, W] and masks [C, H, W] of 0, 1 and IGNORE; NaN where the film lacks the structure."""
    known = truth != IGNORE
    true, predicted = truth == 1, predicted & known
    both = (true & predicted).sum((1, 2))
    total = true.sum((1, 2)) + predicted.sum((1, 2))
    return np.where(true.any((1, 2)), 2 * both / np.maximum(total, 1), np.nan)


def falsely(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share [C] of the film that is predicted although it lacks the structure; NaN where it has it, or nobody said."""
    known = truth != IGNORE
    empty = ~(truth == 1).any((1, 2)) & known.any((1, 2))
    share = (predicted & known).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1)
    return np.where(empty, share, np.nan)


def within(values: np.ndarray) -> np.ndarray:
    """Means [n] of [n, C] over the structures that a film has; NaN where it has none."""
    present = ~np.isnan(values)
    sums = np.where(present, values, 0).sum(1)
    return np.where(present.any(1), sums / np.maximum(present.sum(1), 1), np.nan)


def summary(values: np.ndarray, patients: Sequence[str], seed: int = 0) -> dict:
    """{"value", "std", "n", "interval"} of one value per film, NaN left out; 95 % interval by drawing patients anew.

    None for what so few films do not have, as in `scores.row`.
    """
    keep = ~np.isnan(values)
    values, patients = values[keep], np.asarray(patients)[keep]
    if not len(values):
        return {"value": None, "std": None, "n": 0, "interval": None}
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"value": float(values.mean()), "std": std, "n": len(values), "interval": _interval(values, patients, seed)}


def _interval(values: np.ndarray, patients: np.ndarray, seed: int) -> list[float]:
    """Percentile bootstrap over patients: films of one patient stay together."""
    names, member = np.unique(patients, return_inverse=True)
    sums, counts = (np.bincount(member, weights) for weights in (values, None))
    drawn = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [float(edge) for edge in np.percentile(means, (2.5, 97.5))]
