"""ResNet-50 with frozen statistics, and the image model of BioViL-T around it (arXiv 2301.04558).

Reference: torchvision's ResNet v1.5 (the stride sits on the 3 x 3 convolution, BatchNorm eps 1e-5). BioViL-T looks at
one film at a time here: what it learned to say where no earlier film is given stands in for the difference of two.
Letters: n films, h w rows and columns of the feature map.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Conv(nn.Module):
    """Convolution without a bias, padded by half its side as torch pads: [n, h, w, c] -> [n, h', w', d]."""

    width: int
    side: int
    stride: int = 1
    channels: int = 0  # of the stored kernel; 0: those of the input
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.side, self.side, self.channels or x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        if x.shape[-1] == 1:  # equal channels and their kernels, summed: exact for grey
            kernel = kernel.sum(axis=2, keepdims=True)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride,) * 2,
            [(self.side // 2,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class FrozenNorm(nn.Module):
    """BatchNorm with stored statistics: an affine map per channel, computed in float32."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, ones, zeros = (x.shape[-1],), nn.initializers.ones, nn.initializers.zeros
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        return ((x.astype(jnp.float32) - mean) * factor + bias).astype(self.dtype)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut: [n, h, w, c] -> [n, h / stride, w / stride, 4 width]."""

    width: int
    stride: int
    downsample: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def layer(x, number, width, side, stride=1):
            x = Conv(width, side, stride, dtype=self.dtype, name=f"conv{number}")(x)
            return FrozenNorm(self.dtype, name=f"bn{number}")(x)

        y = nn.relu(layer(x, 1, self.width, 1))
        y = nn.relu(layer(y, 2, self.width, 3, self.stride))
        y = layer(y, 3, 4 * self.width, 1)
        if self.downsample:
            x = Conv(4 * self.width, 1, self.stride, dtype=self.dtype, name="downsample_conv")(x)
            x = FrozenNorm(self.dtype, name="downsample_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """images [n, H, W, 1 or 3] -> "stem" and "layer1" to "layer4", feature maps at 1/4 to 1/32 of the side."""

    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        x = Conv(self.width, 7, 2, channels=3, dtype=self.dtype, name="conv1")(images)
        x = nn.relu(FrozenNorm(self.dtype, name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        out = {"stem": x}
        for layer, count in enumerate(self.blocks, start=1):
            for i in range(count):
                stride = 2 if layer > 1 and i == 0 else 1
                x = Bottleneck(
                    self.width * 2 ** (layer - 1), stride, i == 0, self.dtype, name=f"layer{layer}_{i}"
                )(x)
            out[f"layer{layer}"] = x
        return out


class BioViLT(nn.Module):
    """images [n, H, W, 1 or 3] -> the maps of its ResNet and what BioViL-T makes of them; see `__call__`."""

    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    fused: int = 256
    projection: int = 128
    patch_size: int = 32
    image_size: int = 448
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        """Returns the maps of `ResNet` and: "patches" [n, h, w, 2048], the last of them; "fused" [n, h, w, 512], this
        film and the missing one before it; "global" [n, 512], its mean; "projected_patches" and "projected", in the
        space shared with text.
        """
        out = ResNet(self.blocks, self.width, self.dtype, name="resnet")(images)
        static = Conv(self.fused, 1, dtype=self.dtype, name="backbone_to_vit")(out["layer4"])
        missing = self.param("missing_previous_emb", nn.initializers.normal(0.02), (self.fused,))
        fused = jnp.concatenate([static, jnp.broadcast_to(missing.astype(static.dtype), static.shape)], axis=-1)
        x = Conv(self.projection, 1, dtype=self.dtype, name="projector_0")(fused)
        x = nn.relu(FrozenNorm(self.dtype, name="projector_1")(x))
        projected = nn.Dense(self.projection, dtype=self.dtype, name="projector_3")(x)
        return out | {
            "patches": out["layer4"],
            "fused": fused,
            "global": fused.mean((1, 2)),
            "projected_patches": projected,
            "projected": projected.mean((1, 2)),
        }
