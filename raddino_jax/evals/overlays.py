"""Outlines of masks over films: truth green, prediction red (Figure C.6 of arXiv 2401.10815).

`save` draws one film at its own size; `gallery` shows what a run of task=segment has drawn, with the Dice of each film.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from raddino_jax.data import cases
from raddino_jax.evals.picture import Picture, panels

TRUTH, PREDICTED = (46, 232, 107), (255, 59, 48)
THIN = 150  # pixels of the short side per pixel of an outline's width
SHOWN, COLUMNS, CELL = 8, 4, 2.6  # films, films side by side, inches of each


def outlined(film: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """Film uint8 [H, W] as uint8 [H, W, 3] with the outlines of bool [C, H, W] masks.

    A truth lies under the prediction and is twice as wide, so that it is seen where both agree.
    """
    picture = np.repeat(film[..., None], 3, axis=-1)
    width = max(round(min(film.shape) / THIN), 1)
    for masks, colour, wide in ((truth, TRUTH, 2 * width), (predicted, PREDICTED, width)):
        for mask in () if masks is None else masks:
            # Eroded from inside: an outline belongs to its structure, also at the edge of the film.
            picture[mask & ~ndimage.binary_erosion(mask, iterations=wide)] = colour
    return picture


def save(path: Path, film: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None = None) -> None:
    """Write a film with outlines as PNG, at its own size; see `outlined`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(outlined(film, predicted, truth)).save(path)


def gallery(workdir: Path) -> Picture | None:
    """The first films of overlays/ with their Dice of cases.csv; None where the run has drawn none."""
    folder = workdir / "overlays"
    paths = sorted(folder.rglob("*.png"))[:SHOWN]
    if not paths:
        return None
    dice = _dice(workdir / "cases.csv")
    rows = -(-len(paths) // COLUMNS)
    figure, axes = panels(rows, min(len(paths), COLUMNS), CELL, CELL * 1.1)
    numbers = []
    for axis in axes.ravel():
        axis.axis("off")
    for number, (axis, path) in enumerate(zip(axes.flat, paths, strict=False), start=1):
        scores = dice.get(path.relative_to(folder).with_suffix("").as_posix(), {})
        known = [score for score in scores.values() if score is not None]
        axis.imshow(Image.open(path))
        axis.set_title(f"film {number}" + (f"   Dice {np.mean(known):.2f}" if known else ""), fontsize=10)
        numbers += [dict(film=number, structure=name, dice=score) for name, score in scores.items()]
    figure.tight_layout(pad=0.4)
    return Picture(
        "overlays", "Segmentation of test films",
        "Green: the true outline. Red: what was predicted. Where both agree the red line lies inside the green one.",
        figure, numbers or [dict(film=number) for number in range(1, len(paths) + 1)],
    )


def _dice(path: Path) -> dict[str, dict[str, float | None]]:
    """A film's name without suffix -> {structure: Dice, None where it has none}; without the lines of the mean mask."""
    found: dict[str, dict[str, float | None]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["encoder"] != "mean mask":
                    score = float(row["dice"]) if row["dice"] else None
                    found.setdefault(cases.bare(Path(row["id"])), {})[row["structure"]] = score
    return found
