"""Masks as datasets write them (runs, polygons, boxes, pictures) -> uint8 [H, W], 0 or 1.

A shape is a tuple that JSON can hold: (kind, ...). Coordinates are pixels of the film as distributed, x to the right.

    ("runs", runs, H, W)        gap, length, gap, length, ...: SIIM's run lengths over a raster in column-major order
    ("polygon", points)         [[x, y], ...], filled
    ("box", x1, y1, x2, y2)     columns x1 .. x2 - 1, rows y1 .. y2 - 1
    ("union", shapes)           any of them
    ("both", shapes)            all of them
    ("picture", path)           non-zero pixels of a picture
    ("lung", path, side)        the lung of that side ("left": the patient's, right in the picture) in a picture
                                that shows only lungs
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from raddino_jax.data import images

LUNG_THRESHOLD = 10  # of 255: black areas of a JPEG are not all zero
IGNORE = 255  # in stored masks: this structure was not annotated on this film


class ShapeError(ValueError):
    """A mask that does not fit its film; the message says how."""


def draw(shape: Sequence, height: int, width: int) -> np.ndarray:
    """uint8 [height, width] of 0 and 1. Raises ShapeError, images.ImageError."""
    return _DRAW[shape[0]](height, width, *shape[1:])


def resized(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest neighbour, as films are resized: pixel centres, no shift."""
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def parse_runs(text: str) -> list[int]:
    """"gap length gap length ..." -> numbers; "-1" and "" -> none."""
    runs = [int(word) for word in text.split()]
    if runs in ([], [-1]):
        return []
    if len(runs) % 2 or min(runs) < 0:
        raise ShapeError(f"expected pairs of gap and length, found {len(runs)} numbers, the smallest {min(runs)}")
    return runs


def _runs(height, width, runs, rows, columns):
    if (rows, columns) != (height, width):
        raise ShapeError(f"expected a film of {rows} x {columns} for this mask, found {height} x {width}")
    flat = np.zeros(rows * columns, np.uint8)
    ends = np.cumsum(runs)
    if len(ends) and ends[-1] > flat.size:
        raise ShapeError(f"expected runs of at most {flat.size} pixels, found {ends[-1]}")
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        flat[start:end] = 1
    return np.ascontiguousarray(flat.reshape(columns, rows).T)


def _polygon(height, width, points):
    canvas = Image.new("L", (width, height))
    if len(points) < 3:
        raise ShapeError(f"expected a polygon of at least 3 points, found {len(points)}")
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], fill=1)
    return np.asarray(canvas)


def _box(height, width, x1, y1, x2, y2):
    mask = np.zeros((height, width), np.uint8)
    left, top = max(round(x1), 0), max(round(y1), 0)
    mask[top : max(round(y2), top), left : max(round(x2), left)] = 1
    return mask


def _union(height, width, shapes):
    return np.any([draw(shape, height, width) for shape in shapes], axis=0).astype(np.uint8)


def _both(height, width, shapes):
    return np.all([draw(shape, height, width) for shape in shapes], axis=0).astype(np.uint8)


def _picture(height, width, path):
    return resized((images.read_raw(Path(path)) > 0).astype(np.uint8), height, width)


def _lung(height, width, path, side):
    """Threshold, close and fill, then the two largest parts, told apart by where they lie."""
    from scipy import ndimage

    grey = images.read(Path(path))
    shown = grey > min(LUNG_THRESHOLD, int(grey.max()) // 2)  # masks of 0 and 1 as well
    shown = ndimage.binary_fill_holes(ndimage.binary_closing(shown, iterations=2))
    parts, count = ndimage.label(shown)
    if count == 0:
        raise ShapeError("expected a picture of lungs, found it black")
    sizes = ndimage.sum_labels(shown, parts, range(1, count + 1))
    largest = 1 + np.argsort(-sizes, kind="stable")[:2]
    largest = [part for part in largest if sizes[part - 1] > 0.02 * sizes.max()]
    centres = [centre[1] for centre in ndimage.center_of_mass(shown, parts, largest)]
    lungs = dict(zip(np.array(largest)[np.argsort(centres)], ("right", "left"), strict=False))
    if len(lungs) == 1 and centres[0] > shown.shape[1] / 2:  # one lung only: by its half of the picture
        lungs = {largest[0]: "left"}
    wanted = [part for part, name in lungs.items() if name == side]
    return resized(np.isin(parts, wanted).astype(np.uint8), height, width)


_DRAW = {
    "runs": _runs, "polygon": _polygon, "box": _box, "union": _union, "both": _both, "picture": _picture, "lung": _lung,
}  # fmt: skip
