"""Decoders: patch features of a frozen encoder -> one logit per structure and place.

`Linear` reads the last layer; `ViTDet` and `UPerNet` read four, of which a pyramid is made: transposed convolutions for
its finer levels, pooling for its coarse one. The names and numbers of parameters are those of arXiv 2401.10815,
Table 4 (769, 24,784,129 and 39,338,241 at width 768 and one structure). UPerNet is mmsegmentation's UPerHead on its
Feature2Pyramid (arXiv 1807.10221), without dropout and auxiliary head; the structure that fits the number printed for
ViTDet is the same one without pyramid pooling.
Letters: n films, h w patch rows and columns, D width of the encoder, C structures.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from raddino_jax.models.ops import gelu
from raddino_jax.models.resnet import Conv

Array = jax.Array

POOLS = (1, 2, 3, 6)  # cells per side of the pyramid pooling


class Linear(nn.Module):
    """A 1 x 1 convolution of the last layer: maps [n, 1, h, w, D] -> logits [n, h, w, C]."""

    structures: int
    width: int = 0  # has no say, as there is nothing between features and logits
    dtype: jnp.dtype = jnp.float32
    layers = 1

    @nn.compact
    def __call__(self, maps: Array, train: bool = False) -> Array:
        return logits(maps[:, -1], self.structures, self.dtype, name="classify")


class UPerNet(nn.Module):
    """Feature pyramid with pyramid pooling on its coarsest level: maps [n, 4, h, w, D] -> [n, 4h, 4w, C].

    width: channels of every level. pools: () leaves the pooling out, and the coarsest level is then the pooled third.
    """

    structures: int
    width: int = 512
    pools: Sequence[int] = POOLS
    dtype: jnp.dtype = jnp.float32
    layers = 4

    @nn.compact
    def __call__(self, maps: Array, train: bool = False) -> Array:
        def layer(x, side, name):
            return ConvNorm(self.width, side, self.dtype, name=name)(x, train)

        *fine, coarse = Pyramid(self.dtype, name="pyramid")(maps, train)
        levels = [layer(x, 1, f"lateral_{i}") for i, x in enumerate(fine)]
        if self.pools:
            pooled = [self._pool(coarse, i, cells, layer) for i, cells in enumerate(self.pools)]
            levels.append(layer(jnp.concatenate([coarse, *pooled], -1), 3, "pooling"))
        else:
            levels.append(halve(levels[-1]))
        for i in reversed(range(len(fine))):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[1:3])
        levels = [*(layer(x, 3, f"smooth_{i}") for i, x in enumerate(levels[:-1])), levels[-1]]
        x = jnp.concatenate([resize(x, levels[0].shape[1:3]) for x in levels], -1)
        return logits(layer(x, 3, "fuse"), self.structures, self.dtype, name="classify")

    def _pool(self, x, number, cells, layer):
        pooled = layer(adaptive_mean(x, cells), 1, f"pool_{number}")
        return resize(pooled, x.shape[1:3])


class ViTDet(UPerNet):
    """UPerNet without pyramid pooling: maps [n, 4, h, w, D] -> [n, 4h, 4w, C]."""

    pools: Sequence[int] = ()


class Pyramid(nn.Module):
    """Maps [n, 4, h, w, D] of one size -> four of 4, 2, 1 and 1/2 times the side."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Array, train: bool = False) -> list[Array]:
        def up(x, name):
            return Double(x.shape[-1], self.dtype, name=name)(x)

        finest = Norm(self.dtype, name="norm")(up(maps[:, 0], "up_0"), train)
        return [up(gelu(finest), "up_1"), up(maps[:, 1], "up_2"), maps[:, 2], halve(maps[:, 3])]


class Double(nn.Module):
    """Transposed convolution, 2 x 2 with stride 2: [n, h, w, c] -> [n, 2h, 2w, width]."""

    width: int
    dtype: jnp.dtype = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, channels = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, channels, self.width))
        kernel = kernel.astype(self.dtype)
        x = jnp.einsum("nhwc,abcd->nhawbd", x.astype(self.dtype), kernel)  # windows do not overlap
        x = x.reshape(n, 2 * height, 2 * width, self.width)
        if self.bias:
            x += self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        return x


class Norm(nn.Module):
    """BatchNorm with torch's constants; in training by the batch, else by the running statistics."""

    dtype: jnp.dtype = jnp.float32
    eps: float = 1e-5
    momentum: float = 0.9  # of the running statistics: torch counts it from the other side, as 0.1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=self.momentum, epsilon=self.eps, dtype=self.dtype,
            use_fast_variance=False, name="batch",
        )
        return norm(x)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU: [n, h, w, c] -> [n, h, w, width]."""

    width: int
    side: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = Conv(self.width, self.side, dtype=self.dtype, name="conv")(x)
        return nn.relu(Norm(self.dtype, name="norm")(x, train))


def logits(x: Array, structures: int, dtype: jnp.dtype, name: str) -> Array:
    """The last 1 x 1 convolution: [..., c] -> float32 [..., structures]."""
    return nn.Dense(structures, dtype=dtype, name=name)(x).astype(jnp.float32)


def resize(x: Array, shape: tuple[int, int]) -> Array:
    """Bilinear, pixel centres kept (torch's align_corners=False): [n, h, w, c] -> [n, *shape, c]."""
    if x.shape[1:3] == tuple(shape):
        return x
    return jax.image.resize(x, (len(x), *shape, x.shape[-1]), "linear", antialias=False)


def halve(x: Array) -> Array:
    """The largest value of each 2 x 2 window; an odd last row or column is left out."""
    return nn.max_pool(x, (2, 2), (2, 2))


def adaptive_mean(x: Array, cells: int) -> Array:
    """Means of cells x cells windows that cover [n, h, w, c], as torch's AdaptiveAvgPool2d places them."""
    rows, columns = (jnp.asarray(_windows(side, cells), x.dtype) for side in x.shape[1:3])
    return jnp.einsum("ah,nhwc,bw->nabc", rows, x, columns)


def _windows(side: int, cells: int) -> np.ndarray:
    start = np.arange(cells)[:, None] * side // cells
    end = -(-(np.arange(cells)[:, None] + 1) * side // cells)
    inside = (np.arange(side) >= start) & (np.arange(side) < end)
    return inside / inside.sum(1, keepdims=True)
