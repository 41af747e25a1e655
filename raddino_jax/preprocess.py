"""Films to the squares that a network sees, and the one grey channel that stands for three."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.data import images
from raddino_jax.models.vit import resize_weights


def square(film: np.ndarray, settings: Preprocess) -> np.ndarray:
    """One film, uint8 [H, W] -> float32 [S, S] as the network sees it.

    Raises TypeError for anything but an 8-bit grey picture, images.TooLarge for one that is far from square.
    """
    if film.dtype != np.uint8 or film.ndim != 2:
        raise TypeError(
            f"expected a film as uint8 [H, W], as data.images.read gives it; found {film.dtype} {list(film.shape)}"
        )
    film = _stretched(film) if settings.stretch else film
    if settings.pad:
        levels = _padded(film, settings.pad)
    else:
        levels = _centre(_short_side(film, settings.resize, settings.resample), settings.crop, settings.centre)
    x = levels.astype(np.float32) * np.float32(settings.scale / 255)
    if not settings.standardize:
        x = (x - np.float32(np.mean(settings.mean))) / np.float32(np.mean(settings.std))
    if settings.pad:
        rows = resize_weights(settings.pad, settings.crop, 0.0, False)
        x = rows @ x @ rows.T
    return _standardized(x) if settings.standardize else x


def _short_side(film: np.ndarray, size: int, resample: str) -> np.ndarray:
    height, width = film.shape
    short = min(height, width)
    new = (size * width // short, size * height // short)
    if new[0] * new[1] > images.LIMITS.max_pixels:
        raise images.TooLarge(f"expected a film, found {width} x {height} pixels: a strip")
    if new == (width, height):
        return film
    return np.asarray(Image.fromarray(film).resize(new, Image.Resampling[resample.upper()]))


def _centre(film: np.ndarray, size: int, rounding: str) -> np.ndarray:
    """The centre square; torchvision rounds half pixels to even, Hugging Face down."""
    spare = [side - size for side in film.shape]
    top, left = (round(n / 2) if rounding == "round" else n // 2 for n in spare)
    return film[top : top + size, left : left + size]


def _stretched(film: np.ndarray) -> np.ndarray:
    """Minimum to 0 and maximum to 255, rounded down, in the order of operations of hi-ml-multimodal."""
    x = film.astype(np.float64) - film.min()
    return (x / x.max() * 255).astype(np.uint8) if x.any() else np.zeros_like(film)


def _padded(film: np.ndarray, side: int) -> np.ndarray:
    """Longer side to `side` by Lanczos, the rest black."""
    ratio = side / max(film.shape)
    height, width = (max(int(n * ratio), 1) for n in film.shape)
    small = np.asarray(Image.fromarray(film).resize((width, height), Image.Resampling.LANCZOS))
    out = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = small
    return out


def _standardized(x: np.ndarray) -> np.ndarray:
    """As augment.standardize does it to the views of training."""
    x = x - x[0, 0]
    x = x - x.mean()
    return x / np.sqrt(np.square(x).mean() + np.float32(1 / 255) ** 2)


def fold_grey(arrays: dict, mean: Sequence[float], std: Sequence[float]) -> dict:
    """Parameters that do to the mean-normalised grey film what the given ones do to three normalised channels.

    With z = (g - m0) / s0 and x_c = (g - m_c) / s_c, K_c x_c = K_c (s0 / s_c) z + K_c (m0 - m_c) / s_c: the kernel is
    scaled, and the constant, equal for every patch, joins the bias or, where there is none, the positions.
    """
    if len(mean) == 1:
        return arrays
    m, s = np.asarray(mean), np.asarray(std)
    kernel = next(name for name in arrays if name.endswith("patch_embed/kernel"))
    bias, pos = kernel.replace("kernel", "bias"), kernel.replace("patch_embed/kernel", "pos_embed")
    values = np.asarray(arrays[kernel], np.float64)
    constant = np.einsum("pqcd,c->d", values, (m.mean() - m) / s)
    folded = {kernel: values * (s.mean() / s)[:, None]}
    if bias in arrays:
        folded[bias] = arrays[bias] + constant
    else:
        folded[pos] = np.concatenate([arrays[pos][:, :1], arrays[pos][:, 1:] + constant], axis=1)
    return arrays | {name: value.astype(np.float32) for name, value in folded.items()}
