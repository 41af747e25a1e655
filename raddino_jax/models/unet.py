"""U-Nets, trained from pixels to mask: the upper bound that frozen encoders are held against.

`ResidualUNet` is nnU-Net's residual network as MONAI's DynUNet builds it (7 levels, instance norm, leaky ReLU):
17,857,153 parameters for one channel in and one structure out, as arXiv 2401.10815, Table 4 prints 17.9 M.
`EfficientUNet` is EfficientNet-B6 (arXiv 1905.11946) with a U-Net decoder: 42,492,473. Table 4 prints 45.9 M, which no
public combination gives; segmentation-models-pytorch counts 43,824,185, with a last layer that a U-Net never runs.
Letters: n films, S pixels per side, C structures.
"""

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from raddino_jax.models.decoders import ConvNorm, Double, Norm, logits
from raddino_jax.models.resnet import Conv

Array = jax.Array

FILTERS = (64, 96, 128, 192, 256, 384, 512)


def _padded(network):
    """A call on films of any size: black around them up to a multiple of the coarsest pixel, cut off again."""

    def call(self, images: Array, train: bool = False) -> Array:
        height, width = images.shape[1:3]
        margins = [divmod(-side % self.stride, 2) for side in (height, width)]
        pads = [(half, half + odd) for half, odd in margins]
        x = network(self, jnp.pad(images, [(0, 0), *pads, (0, 0)]), train)
        return x[:, pads[0][0] : pads[0][0] + height, pads[1][0] : pads[1][0] + width]

    return call


# --- nnU-Net's residual U-Net -------------------------------------------------------------------------------


class ResidualUNet(nn.Module):
    """images [n, S, S, 1] -> logits [n, S, S, C]; filters: channels per level, each half the side of the one before."""

    structures: int
    filters: Sequence[int] = FILTERS
    dtype: jnp.dtype = jnp.float32

    @property
    def stride(self) -> int:
        """Side of the coarsest level's pixel, in pixels of the film."""
        return 2 ** (len(self.filters) - 1)

    @nn.compact
    @_padded
    def __call__(self, images: Array, train: bool = False) -> Array:
        x, skips = images, []
        for i, width in enumerate(self.filters):
            x = Residual(width, 2 if i else 1, self.dtype, name=f"down_{i}")(x)
            skips.append(x)
        for i in reversed(range(len(self.filters) - 1)):
            x = Double(self.filters[i], self.dtype, bias=False, name=f"up_{i}")(x)
            x = Plain(self.filters[i], self.dtype, name=f"merge_{i}")(jnp.concatenate([x, skips[i]], -1))
        return logits(x, self.structures, self.dtype, name="classify")


leaky_relu = partial(nn.leaky_relu, negative_slope=0.01)


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, projected where size or channels change."""

    width: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layer = partial(ConvInstance, self.width, dtype=self.dtype)
        y = leaky_relu(layer(3, self.stride, name="conv1")(x))
        y = layer(3, name="conv2")(y)
        if self.stride > 1 or x.shape[-1] != self.width:
            x = layer(1, self.stride, name="shortcut")(x)
        return leaky_relu(x + y)


class Plain(nn.Module):
    """Two 3 x 3 convolutions."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for name in ("conv1", "conv2"):
            x = leaky_relu(ConvInstance(self.width, 3, dtype=self.dtype, name=name)(x))
        return x


class ConvInstance(nn.Module):
    """Convolution and instance norm: each channel of each film gets zero mean and unit variance."""

    width: int
    side: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.width, self.side, self.stride, dtype=self.dtype, name="conv")(x)
        return nn.InstanceNorm(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name="norm")(x)


# --- EfficientNet with a U-Net decoder ----------------------------------------------------------------------

# Stages of EfficientNet-B0: kernel side, stride, expansion, channels, repeats. The first three fields hold for all
# sizes; channels and repeats are scaled.
STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip
B6 = (1.8, 2.6)  # factors of channels and of repeats


def scaled(channels: int, factor: float) -> int:
    """Channels times a factor, to the nearest multiple of 8, never more than a tenth below."""
    wanted = channels * factor
    found = max(8, int(wanted + 4) // 8 * 8)
    return found + 8 if found < 0.9 * wanted else found


class EfficientUNet(nn.Module):
    """images [n, S, S, 1] -> logits [n, S, S, C].

    scale: factors of EfficientNet's channels and repeats, B6 by default; decoder: channels of its levels, coarse to
    fine; drop: chance that a residual branch of the last block is left out in training (with key "dropout"), falling
    to 0 for the first.
    """

    structures: int
    scale: tuple[float, float] = B6
    decoder: Sequence[int] = (256, 128, 64, 32, 16)
    drop: float = 0.2
    dtype: jnp.dtype = jnp.float32
    stride = 32

    @nn.compact
    @_padded
    def __call__(self, images: Array, train: bool = False) -> Array:
        *skips, x = self._encode(images, train)
        for i, width in enumerate(self.decoder):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = jnp.concatenate([x, skips.pop()], -1) if skips else x
            for name in ("conv1", "conv2"):
                x = ConvNorm(width, 3, self.dtype, name=f"decoder_{i}_{name}")(x, train)
        x = nn.Conv(self.structures, (3, 3), dtype=self.dtype, name="classify")(x)
        return x.astype(jnp.float32)

    def _encode(self, x: Array, train: bool) -> list[Array]:
        """Feature maps at 1/2 to 1/32 of the side."""
        wide, deep = self.scale
        x = _conv(x, scaled(32, wide), 3, 2, self.dtype, "stem")
        x = nn.silu(_norm(self.dtype, "stem_norm")(x, train))
        found, number = [x], 0
        total = sum(math.ceil(deep * repeats) for *_, repeats in STAGES)
        for side, stride, expansion, channels, repeats in STAGES:
            if stride > 1 and number > math.ceil(deep):  # the first skip is the stem, not the first stage
                found.append(x)
            for i in range(math.ceil(deep * repeats)):
                x = MBConv(
                    scaled(channels, wide), side, 1 if i else stride, expansion, self.drop * number / total,
                    self.dtype, name=f"block_{number}",
                )(x, train)
                number += 1
        return [*found, x]


class MBConv(nn.Module):
    """Inverted bottleneck: widen, filter each channel, weigh the channels, narrow; a shortcut where sizes agree."""

    width: int
    side: int
    stride: int
    expansion: int
    drop: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        given, channels = x, x.shape[-1]
        norm = partial(_norm, self.dtype)
        if self.expansion > 1:
            x = nn.silu(norm("expand_norm")(_conv(x, channels * self.expansion, 1, 1, self.dtype, "expand"), train))
        x = _conv(x, x.shape[-1], self.side, self.stride, self.dtype, "filter", groups=x.shape[-1])
        x = nn.silu(norm("filter_norm")(x, train))
        weight = nn.silu(nn.Dense(max(channels // 4, 1), dtype=self.dtype, name="squeeze")(x.mean((1, 2))))
        weight = nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype, name="excite")(weight))
        x = norm("narrow_norm")(_conv(x * weight[:, None, None], self.width, 1, 1, self.dtype, "narrow"), train)
        if self.stride > 1 or channels != self.width:
            return x
        return given + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3))(x, deterministic=not train)


def _conv(x: Array, width: int, side: int, stride: int, dtype: jnp.dtype, name: str, groups: int = 1) -> Array:
    """Padded as TensorFlow does, where EfficientNet comes from: at stride 2 more below and at the right."""
    conv = nn.Conv(
        width, (side, side), stride, "SAME", feature_group_count=groups, use_bias=False, dtype=dtype, name=name
    )
    return conv(x)


def _norm(dtype: jnp.dtype, name: str) -> Norm:
    return Norm(dtype, eps=1e-3, momentum=0.99, name=name)
