"""From a film to the square that a network sees, and back: where the square lies, masks in it, predictions over it.

Letters: H W pixels of the film, S of the square, C structures.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from PIL import Image

from raddino_jax.encoders import Preprocess, square

FITS = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class Frame:
    """What of a film the square shows, in pixels of the film; parts of it may lie outside."""

    top: float
    left: float
    height: float
    width: float


def framed(film: np.ndarray, settings: Preprocess, fit: str = "crop") -> tuple[np.ndarray, Frame]:
    """Film uint8 [H, W] -> (levels uint8 [S, S] before normalisation, what they show).

    fit: "crop" is the encoder's own way, the centre of the film; "pad" puts black beside it until it is square,
    "stretch" makes it square, and both show all of it.
    """
    height, width = film.shape
    side = max(film.shape)
    if fit == "pad":
        top, left = (side - height) // 2, (side - width) // 2
        film = np.pad(film, [(top, side - height - top), (left, side - width - left)])
        shown = seen((side, side), settings)
        frame = Frame(shown.top - top, shown.left - left, shown.height, shown.width)
    elif fit == "stretch":
        film = np.asarray(Image.fromarray(film).resize((side, side), Image.Resampling.BICUBIC))
        shown, down, across = seen((side, side), settings), height / side, width / side
        frame = Frame(shown.top * down, shown.left * across, shown.height * down, shown.width * across)
    else:
        frame = seen(film.shape, settings)
    levels = dataclasses.replace(settings, mean=(0.0,), std=(1.0,), scale=255.0, standardize=False)
    return np.rint(square(film, levels)).clip(0, 255).astype(np.uint8), frame


def seen(shape: tuple[int, int], settings: Preprocess) -> Frame:
    """What `preprocess.square` shows of a film of this shape."""
    height, width = shape
    if settings.pad:
        ratio = settings.pad / max(shape)
        new = [max(int(n * ratio), 1) for n in shape]
        margins, side = [-((settings.pad - n) // 2) for n in new], settings.pad
    else:
        new, side = [settings.resize * n // min(shape) for n in shape], settings.crop
        spare = [n - side for n in new]
        margins = [round(n / 2) if settings.centre == "round" else n // 2 for n in spare]
    down, across = height / new[0], width / new[1]
    return Frame(margins[0] * down, margins[1] * across, side * down, side * across)


def in_frame(masks: np.ndarray, frame: Frame, size: int, outside: int = 0) -> np.ndarray:
    """Masks [C, H, W] -> [C, S, S], nearest neighbour; outside the film as said."""
    rows, columns = _nearest(frame.top, frame.height, size), _nearest(frame.left, frame.width, size)
    found = masks[:, rows.clip(0, masks.shape[1] - 1)][:, :, columns.clip(0, masks.shape[2] - 1)]
    inside = ((rows >= 0) & (rows < masks.shape[1]))[:, None] & (columns >= 0) & (columns < masks.shape[2])
    return np.where(inside, found, np.uint8(outside))


def _nearest(start: float, length: float, size: int) -> np.ndarray:
    return np.floor(start + (np.arange(size) + 0.5) * length / size).astype(int)


def over_film(logits: np.ndarray, frame: Frame, shape: tuple[int, int]) -> np.ndarray:
    """Logits [C, S, S] -> [C, H, W] of the film, bilinear; 0, which is nothing, where the square did not reach."""
    size = logits.shape[-1]
    rows = _bilinear(frame.top, frame.height, shape[0], size)
    columns = _bilinear(frame.left, frame.width, shape[1], size)
    return np.matmul(rows, np.matmul(logits, columns.T))


def _bilinear(start: float, length: float, pixels: int, size: int) -> np.ndarray:
    """Weights [pixels, size] with which the square's pixels make those of the film."""
    place = (np.arange(pixels) + 0.5 - start) * size / length
    inside = (place > 0) & (place < size)
    place = (place - 0.5).clip(0, size - 1)
    low = np.floor(place).astype(int)
    weights = np.zeros((pixels, size), np.float32)
    every = np.arange(pixels)
    weights[every, low] = 1 - (place - low)
    weights[every, np.minimum(low + 1, size - 1)] += place - low
    return weights * inside[:, None]
