"""CLIP's image tower (OpenAI's, and CheXzero, which was tuned from it), and a projection for other towers.

It differs from DINOv2's transformer in a norm before the first block, x sigmoid(1.702 x) for GELU, LayerNorm eps
1e-5, no bias at the patches, and a final norm of the class token alone. Reference: arXiv 2103.00020, openai/CLIP
`model.py`.
Letters as in models/vit.py.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from raddino_jax.models.vit import Attention, resize_pos_embed, split

Array = jax.Array

_normal = nn.initializers.normal(0.02)


def _norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


def quick_gelu(x: Array) -> Array:
    """The sigmoid approximation of GELU that CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


class CLIPViT(nn.Module):
    """images [n, H, W, 1 or 3] -> every named intermediate; see `__call__`.

    image_size: pixels per side of the stored position grid. projection: width of the space shared with text, or 0.
    attention: a backend of `attention`.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    image_size: int
    projection: int = 0
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        """Returns "cls" [n, D] after the final norm, "projected" [n, projection], "patches" [n, N, D] as the last
        block leaves them (CLIP has no norm for them), "embedded" the input of the first block, "blocks_i" the output
        of block i.

        Raises ValueError when the patch size does not divide the image.
        """
        x = _norm(self.dtype, "norm_pre")(self._embed(images))
        out = {"embedded": x}
        for i in range(self.depth):
            x = Block(self.heads, self.attention, self.dtype, name=f"blocks_{i}")(x)
            out[f"blocks_{i}"] = x
        out |= split(x, registers=0)
        out["cls"] = _norm(self.dtype, "norm")(out["cls"])
        if self.projection:
            out["projected"] = nn.Dense(self.projection, use_bias=False, dtype=self.dtype, name="proj")(
                out["cls"]
            )
        return out

    def _embed(self, images: Array) -> Array:
        p, stored = self.patch_size, self.image_size // self.patch_size
        height, width = images.shape[1:3]
        if height % p or width % p:
            raise ValueError(
                f"images of {height} x {width} pixels: both sides must be multiples of the patch size {p}"
            )
        x = Patches(self.width, p, self.dtype, name="patch_embed")(images)
        cls = self.param("cls_token", _normal, (1, 1, self.width))
        pos = self.param("pos_embed", _normal, (1, 1 + stored**2, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (len(x), 1, self.width)), x], axis=1)
        grid = (height // p, width // p)
        return x + resize_pos_embed(pos, grid, offset=0.0, antialias=False).astype(x.dtype)


class Patches(nn.Module):
    """Non-overlapping patches to tokens, without a bias: [n, H, W, C] -> [n, N, D], rows first."""

    width: int
    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        p = self.patch_size
        kernel = self.param("kernel", _normal, (p, p, 3, self.width))
        if images.shape[-1] == 1:  # three equal channels and their kernels, summed: exact for grey
            kernel = kernel.sum(axis=2, keepdims=True)
        patches = einops.rearrange(images, "n (h p) (w q) c -> n (h w) (p q c)", p=p, q=p)
        kernel = einops.rearrange(kernel, "p q c d -> (p q c) d")
        return patches.astype(self.dtype) @ kernel.astype(self.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: [n, T, D] -> [n, T, D]."""

    heads: int
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        attended = Attention(self.heads, self.attention, self.dtype, name="attn")(_norm(self.dtype, "norm1")(x))
        x = x + attended
        return x + Mlp(self.dtype, name="mlp")(_norm(self.dtype, "norm2")(x))


class Mlp(nn.Module):
    """Linear, quick GELU, linear; hidden width 4 D."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = quick_gelu(nn.Dense(4 * x.shape[-1], kernel_init=_normal, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], kernel_init=_normal, dtype=self.dtype, name="fc2")(hidden)


class Projected(nn.Module):
    """A tower and the projection of its class token into the space shared with text (BiomedCLIP)."""

    trunk: nn.Module
    projection: int

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        """What the tower returns, and "projected" [n, projection]."""
        out = self.trunk(images)
        project = nn.Dense(self.projection, use_bias=False, dtype=self.trunk.dtype, name="proj")
        return out | {"projected": project(out["cls"])}
