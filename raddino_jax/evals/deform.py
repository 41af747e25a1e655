"""Films and their masks, deformed together on the device: affine, elastic, flip, gamma, brightness, contrast.

The paper (arXiv 2401.10815, E.3.2) names these and no ranges; the defaults are those that the same team published for
films (hi-ml, cxr_linear_head_augmentations.yaml) and for elastic fields. As in `augment` a deformation is drawn first
and applied afterwards, levels are whole numbers in 0..255, and there is no branch to compile.
Letters: S pixels per side, C structures.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from raddino_jax import augment

Array = jax.Array


@dataclass(frozen=True)
class Deformation:
    """Chances and strengths. A factor is U(1 - x, 1 + x); gamma an interval; angles in degrees, both ways.

    elastic_alpha, elastic_sigma: U(-1, 1) noise, blurred by sigma pixels, times alpha pixels.
    """

    affine: float = 0.5
    rotation: float = 30.0
    shear: float = 15.0
    elastic: float = 0.4
    elastic_alpha: float = 34.0
    elastic_sigma: float = 4.0
    flip: float = 0.5
    intensity: float = 1.0
    gamma: tuple[float, float] = (0.5, 1.5)
    brightness: float = 0.2
    contrast: float = 0.2


def deform(key: Array, film: Array, masks: Array, settings: Deformation) -> tuple[Array, Array]:
    """(film float32 [S, S], masks uint8 [S, S, C]), both deformed alike.

    Films are resampled bilinearly, masks by nearest neighbour; what comes in from outside is black and empty.
    """
    place, light = jax.random.split(key)
    rows, columns = displaced(place, film.shape, settings)
    film = map_coordinates(film, [rows, columns], order=1, mode="constant")
    size = film.shape[0]
    row, column = jnp.round(rows).astype(jnp.int32), jnp.round(columns).astype(jnp.int32)
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    masks = jnp.where(inside[..., None], masks[row.clip(0, size - 1), column.clip(0, size - 1)], 0)
    return lit(light, film, settings), masks


def displaced(key: Array, shape: tuple[int, int], settings: Deformation) -> tuple[Array, Array]:
    """Where in the given film each pixel of the deformed one comes from: rows and columns [S, S]."""
    s, size = settings, shape[0]
    key, noise = jax.random.split(key)
    u = jax.random.uniform(key, (5,))
    turned = u[0] < s.affine
    angle = jnp.deg2rad(jnp.where(turned, s.rotation * (2 * u[1] - 1), 0.0))
    shear = jnp.tan(jnp.deg2rad(jnp.where(turned, s.shear * (2 * u[2] - 1), 0.0)))
    axis = jnp.arange(size) - (size - 1) / 2
    y, x = jnp.meshgrid(axis, axis, indexing="ij")
    x = jnp.where(u[3] < s.flip, -x, x)
    x = x + shear * y
    rows = jnp.cos(angle) * y - jnp.sin(angle) * x
    columns = jnp.sin(angle) * y + jnp.cos(angle) * x
    if s.elastic:
        field = elastic(noise, size, s) * (u[4] < s.elastic)
        rows, columns = rows + field[0], columns + field[1]
    return rows + (size - 1) / 2, columns + (size - 1) / 2


def elastic(key: Array, size: int, settings: Deformation) -> Array:
    """A smooth random field [2, S, S] in pixels: white noise under a Gaussian, which is two matrix products."""
    distance = jnp.arange(size)[:, None] - jnp.arange(size)
    blur = jnp.exp(-0.5 * jnp.square(distance / settings.elastic_sigma))
    blur /= blur.sum(1, keepdims=True)
    noise = jax.random.uniform(key, (2, size, size), minval=-1, maxval=1)
    return settings.elastic_alpha * jnp.einsum("ab,kbc,dc->kad", blur, noise, blur)


def lit(key: Array, film: Array, settings: Deformation) -> Array:
    """Levels [S, S] under another exposure; the film's own with a chance of 1 - intensity."""
    s = settings
    u = jax.random.uniform(key, (4,))

    def between(k, low, high):
        return jnp.where(u[3] < s.intensity, low + (high - low) * u[k], 1.0)

    film = augment.gamma_curve(film, between(0, *s.gamma))
    film = augment.brightness(film, between(1, 1 - s.brightness, 1 + s.brightness))
    return augment.contrast(film, between(2, 1 - s.contrast, 1 + s.contrast))
