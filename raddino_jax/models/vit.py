"""The DINOv2 vision transformer in all its sizes, as pure init/apply.

Reference: facebookresearch/dinov2 `models/vision_transformer.py` (arXiv 2304.07193); RAD-DINO trains
ViT-B/14 without registers (arXiv 2401.10815, E.1).
Letters: n crops, H W pixels, p patch side, h w patch rows and columns, N = h w patches, R registers,
T = 1 + R + N tokens, D width, M x M the stored grid of position embeddings.
"""

from collections.abc import Callable, Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from raddino_jax.models.attention import attention, weights
from raddino_jax.models.heads import uniform
from raddino_jax.models.ops import LINEAR, STD, Dense, LayerNorm, gelu

Array = jax.Array

VARIANTS = {
    "Ti": dict(width=192, depth=12, heads=3, ffn="mlp"),
    "S": dict(width=384, depth=12, heads=6, ffn="mlp"),
    "B": dict(width=768, depth=12, heads=12, ffn="mlp"),
    "L": dict(width=1024, depth=24, heads=16, ffn="mlp"),
    "g": dict(width=1536, depth=40, heads=24, ffn="swiglu"),
}

REMAT = {  # what the backward pass of a block may keep; "none" keeps everything
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR),
    "full": jax.checkpoint_policies.nothing_saveable,
}

_normal = nn.initializers.normal(STD)


class ViT(nn.Module):
    """images [n, H, W, 1 or 3] -> every named intermediate; see `__call__`.

    Field values are those of `VARIANTS`, and:
    image_size: pixels per side of the stored position grid (M = image_size / patch_size).
    layerscale: initial LayerScale, 0 leaves the layer out.
    antialias, offset: how position embeddings are resized (`resize_weights`): False, 0.1 for hub
      models and RAD-DINO; True, 0.0 for register models; False, 0.0 for Hugging Face's Dinov2Model.
    mask_token: False for encoders that were never trained with masks and have none.
    remat: a key of REMAT. attention: a backend of `attention`.
    """

    width: int
    depth: int
    heads: int
    ffn: str = "mlp"
    patch_size: int = 14
    image_size: int = 518
    registers: int = 0
    layerscale: float = 1e-5
    antialias: bool = False
    offset: float = 0.1
    mask_token: bool = True
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Array, masks: Array | None = None, subsets: Sequence | None = None, wanted: Array | None = None
    ) -> dict[str, Array]:
        """Forward pass.

        masks: bool [n, N], True where the patch is replaced by the mask token.
        subsets: per block a pair (attention, feed-forward) of int [groups, m], the crops of each
          group that take part in the branch (`draw_subsets`); None runs every crop.
        wanted: int [groups, m], patches of each group, counted through the N of each of its crops; None: all.
          The last feed-forward runs on class tokens and on these alone.
        Returns a dict: "cls" [n, D], "registers" [n, R, D], "patches" [n, N, D], all after the final norm;
          "prenorm" [n, T, D] before it; "embedded" [n, T, D] the input of the first block;
          "blocks_i" [n, T, D] the output of block i, "blocks_i/attn" the stream after its attention.
          With `wanted`: "cls" [n, D], "patches" [groups, m, D], no "registers"; the last "blocks_i" and "prenorm"
          hold, in each group, its class tokens and then these patches.
        Raises ValueError when the patch size does not divide the image.
        """
        grid = self._grid(images)
        x = self._embed(images, masks, grid)
        out = {"embedded": x}
        tokens = None if wanted is None else self._tokens(wanted, len(x), grid)
        policy = REMAT[self.remat]
        block = Block if policy is None else nn.remat(Block, policy=policy)
        for i in range(self.depth):
            branches = (None, None) if subsets is None else subsets[i]
            last = i == self.depth - 1
            out[f"blocks_{i}/attn"], x = block(
                self.width, self.heads, self.ffn, self.layerscale, self.attention, self.dtype,
                name=f"blocks_{i}",
            )(x, *branches, tokens if last else None)
            out[f"blocks_{i}"] = x
        normed = LayerNorm(self.dtype, name="norm")(x)
        out["prenorm"] = x
        if wanted is None:
            return out | split(normed, self.registers)
        crops = normed.shape[1] - wanted.shape[1]
        return out | {"cls": normed[:, :crops].reshape(-1, self.width), "patches": normed[:, crops:]}

    def _tokens(self, patches: Array, crops: int, grid: tuple[int, int]) -> Array:
        """Patches [groups, m] of n crops -> [groups, n / groups + m]: its class tokens and these, counted through all T
        of each of its crops."""
        groups, of_crop, first = len(patches), grid[0] * grid[1], 1 + self.registers
        cls = jnp.broadcast_to(jnp.arange(crops // groups) * (first + of_crop), (groups, crops // groups))
        return jnp.concatenate([cls, patches // of_crop * (first + of_crop) + first + patches % of_crop], axis=1)

    def _grid(self, images: Array) -> tuple[int, int]:
        p = self.patch_size
        height, width = images.shape[1:3]
        if height % p or width % p:
            raise ValueError(f"images of {height} x {width} pixels: both sides must be multiples of the patch size {p}")
        return height // p, width // p

    def _embed(self, images: Array, masks: Array | None, grid: tuple[int, int]) -> Array:
        stored = self.image_size // self.patch_size
        x = PatchEmbed(self.width, self.patch_size, self.dtype, name="patch_embed")(images)
        cls = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        pos = self.param("pos_embed", _normal, (1, 1 + stored**2, self.width))
        if self.mask_token:
            mask_token = self.param("mask_token", nn.initializers.zeros, (1, self.width))
        if masks is not None:
            x = jnp.where(masks[..., None], mask_token.astype(x.dtype), x)
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (len(x), 1, self.width)), x], axis=1)
        x += resize_pos_embed(pos, grid, self.offset, self.antialias).astype(x.dtype)
        if self.registers:  # after the position embedding: registers have no place
            registers = self.param("register_tokens", nn.initializers.normal(1e-6), (1, self.registers, self.width))
            registers = jnp.broadcast_to(registers.astype(x.dtype), (len(x), *registers.shape[1:]))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        return x


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [n, H, W, C] -> [n, N, D], rows first."""

    width: int
    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        p = self.patch_size
        init = uniform((3 * p * p) ** -0.5)  # torch's Conv2d default, which DINOv2 leaves as it is
        kernel = self.param("kernel", init, (p, p, 3, self.width))
        bias = self.param("bias", init, (self.width,))
        if images.shape[-1] == 1:  # three equal channels and their kernels, summed: exact for grey
            kernel = kernel.sum(axis=2, keepdims=True)
        patches = einops.rearrange(images, "n (h p) (w q) c -> n (h w) (p q c)", p=p, q=p)
        kernel = einops.rearrange(kernel, "p q c d -> (p q c) d")
        return patches.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: [n, T, D] -> (after attention, after feed-forward), both [n, T, D].

    wanted: int [groups, m], tokens of each group of crops, each crop's T after the other's: the second is
      [groups, m, D].
    """

    width: int
    heads: int
    ffn: str
    layerscale: float
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Array, attn_subset: Array | None = None, ffn_subset: Array | None = None, wanted: Array | None = None
    ):
        width = x.shape[-1]
        norm1, norm2 = (LayerNorm(self.dtype, name=f"norm{i}").rule(width) for i in (1, 2))
        gamma1, gamma2 = (LayerScale(self.layerscale, name=f"ls{i}")(width) for i in (1, 2))
        attn = Attention(self.heads, self.attention, self.dtype, name="attn")
        ffn = FFN[self.ffn](self.dtype, name="mlp")
        x = residual(x, lambda t: attn(t, norm1, gamma1), attn_subset)
        return x, residual(x, lambda t: ffn(t, norm2, gamma2), ffn_subset, wanted)


class Attention(nn.Module):
    """Multi-head self-attention; one fused projection with rows [q | k | v], heads contiguous in each.

    norm: a LayerNorm before it, and gamma: a LayerScale [D] after it, both inside its projections (`Dense`).
    """

    heads: int
    backend: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, norm: Callable | None = None, gamma: Array | None = None) -> Array:
        width = x.shape[-1]
        qkv = Dense(3 * width, self.dtype, name="qkv")(x, norm)
        q, k, v = einops.rearrange(qkv, "n t (three h d) -> three n t h d", three=3, h=self.heads)
        x = einops.rearrange(attention(q, k, v, self.backend), "n t h d -> n t (h d)")
        return Dense(width, self.dtype, name="proj")(x, gamma=gamma)


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear; hidden width 4 D. norm, gamma: as in `Attention`."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, norm: Callable | None = None, gamma: Array | None = None) -> Array:
        hidden = Dense(4 * x.shape[-1], self.dtype, name="fc1")(x, norm)
        return Dense(x.shape[-1], self.dtype, name="fc2")(hidden, gelu, gamma)


class SwiGLU(nn.Module):
    """silu(a) * b, both halves of one projection; hidden width 8/3 D rounded up to a multiple of 8."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, norm: Callable | None = None, gamma: Array | None = None) -> Array:
        hidden = (int(4 * x.shape[-1] * 2 / 3) + 7) // 8 * 8
        gate, value = jnp.split(Dense(2 * hidden, self.dtype, name="w12")(x, norm), 2, -1)
        return Dense(x.shape[-1], self.dtype, name="w3")(nn.silu(gate) * value, gamma=gamma)


FFN = {"mlp": Mlp, "swiglu": SwiGLU}


class LayerScale(nn.Module):
    """A learned factor [D] per channel, None (no such layer) when the initial value is 0."""

    initial: float

    @nn.compact
    def __call__(self, width: int) -> Array | None:
        if not self.initial:
            return None
        return self.param("gamma", nn.initializers.constant(self.initial), (width,))


def split(tokens: Array, registers: int) -> dict[str, Array]:
    """[n, T, D] -> {"cls" [n, D], "registers" [n, R, D], "patches" [n, N, D]}."""
    first = 1 + registers
    return {"cls": tokens[:, 0], "registers": tokens[:, 1:first], "patches": tokens[:, first:]}


def grid_means(patches: Array, side: int = 3) -> Array:
    """Patches [n, h, w, D], or [n, N, D] of a square, averaged over side x side regions: [n, side * side * D].

    Where a side does not divide h, neighbouring regions share a row, as in adaptive pooling.
    """
    if patches.ndim == 3:
        rows = round(patches.shape[1] ** 0.5)
        patches = patches.reshape(len(patches), rows, rows, -1)
    means = [
        patches[:, k * h // side : -(-(k + 1) * h // side), j * w // side : -(-(j + 1) * w // side)].mean((1, 2))
        for h, w in [patches.shape[1:3]]
        for k in range(side)
        for j in range(side)
    ]
    return jnp.concatenate(means, axis=-1)


FEATURES = {  # one vector of a film from {"cls" [n, D], "patches" [n, ..., D]}, for probes
    "cls": lambda out: out["cls"],
    "cls+patches": lambda out: jnp.concatenate(
        [out["cls"], out["patches"].reshape(len(out["cls"]), -1, out["cls"].shape[-1]).mean(1)], axis=-1
    ),
    "cls+grid": lambda out: jnp.concatenate([out["cls"], grid_means(out["patches"])], axis=-1),
}


def attention_maps(model: ViT, params: dict, images: Array) -> Array:
    """Attention probabilities [n, H, T, T] of the last block."""
    out = model.apply({"params": params}, images)
    last = model.depth - 1
    before, block = out[f"blocks_{last - 1}" if last else "embedded"], params[f"blocks_{last}"]
    x = LayerNorm(model.dtype).apply({"params": block["norm1"]}, before)
    qkv = Dense(3 * model.width, model.dtype).apply({"params": block["attn"]["qkv"]}, x)
    q, k, _ = einops.rearrange(qkv, "n t (three h d) -> three n t h d", three=3, h=model.heads)
    return weights(q, k)


def residual(x: Array, branch, subset: Array | None, wanted: Array | None = None) -> Array:
    """x + branch(x), or the branch on a subset of crops only, scaled up to keep its expectation.

    subset: int [groups, m]; x [n, T, D] holds groups of n / groups consecutive crops, and crop
    subset[g, j] of group g takes part. Only those crops are computed: at rate 0.3 that saves 30 %.
    wanted: int [groups, w]; the result is that of these tokens alone, [groups, w, D], and `branch` may not mix tokens.
    """
    if wanted is not None:
        return _residual_of(x, branch, subset, wanted)
    if subset is None:
        return x + branch(x)
    groups, m = subset.shape
    grouped = x.reshape(groups, len(x) // groups, *x.shape[1:])
    picked = jnp.take_along_axis(grouped, subset[:, :, None, None], axis=1)
    delta = branch(picked.reshape(groups * m, *x.shape[1:])).reshape(picked.shape)
    delta = delta * (grouped.shape[1] / m)
    add = jax.vmap(lambda rows, index, change: rows.at[index].add(change, unique_indices=True))
    return add(grouped, subset, delta).reshape(x.shape)


def _residual_of(x, branch, subset, wanted):
    """The tokens of dropped crops are few here: they are computed and weigh nothing."""
    groups, tokens, width = len(wanted), x.shape[1], x.shape[2]
    picked = jnp.take_along_axis(x.reshape(groups, -1, width), wanted[..., None], axis=1)
    delta = branch(picked)
    if subset is not None:
        takes_part = (wanted[:, :, None] // tokens == subset[:, None]).any(-1, keepdims=True)
        delta = delta * jnp.where(takes_part, len(x) / subset.size, 0.0).astype(delta.dtype)
    return picked + delta


def draw_subsets(key: Array, groups: Array, crops: int, rates: Sequence[float]) -> list | None:
    """Stochastic depth as the reference trains it: per group, block and branch a fresh subset of crops.

    key: of the step and crop size; each group folds in its own index, so the draw does not
      depend on how groups are spread over devices.
    groups: int [G], their numbers in the global batch. crops: crops per group. rates: drop rate of each block.
    Returns per block (attention, feed-forward) int [groups, max(int(crops (1 - rate)), 1)], or None
    where every rate is 0.
    """
    if not any(rates):
        return None

    def one_group(group):
        draws = jax.random.uniform(jax.random.fold_in(key, group), (len(rates), 2, crops))
        return jnp.argsort(draws, axis=-1)

    orders = jax.vmap(one_group)(groups)
    kept = [max(int(crops * (1 - rate)), 1) for rate in rates]
    return [
        tuple(orders[:, i, branch, :m] if rate else None for branch in range(2))
        for i, (rate, m) in enumerate(zip(rates, kept, strict=True))
    ]


def resize_pos_embed(pos: Array, grid: tuple[int, int], offset: float, antialias: bool) -> Array:
    """Stored table [1, 1 + M*M, D] -> [1, 1 + h*w, D] in float32; the cls slot stays as it is.

    The gradient flows through: local crops train the whole table.
    """
    stored = int(round((pos.shape[1] - 1) ** 0.5))
    if grid == (stored, stored):
        return pos
    rows, columns = (resize_weights(stored, n, offset, antialias) for n in grid)
    table = pos[:, 1:].astype(jnp.float32).reshape(stored, stored, -1)
    table = jnp.einsum("hm,mkd,wk->hwd", rows, table, columns, precision="highest")
    return jnp.concatenate([pos[:, :1], table.reshape(1, -1, pos.shape[-1]).astype(pos.dtype)], axis=1)


def sincos(side: int, width: int) -> np.ndarray:
    """Position embeddings [1, 1 + side * side, width] as sines and cosines of row and column; 0 for the class token.

    Half of the width tells the row, half the column, at width / 4 wavelengths from 2 pi to 20,000 pi patches, as
    arXiv 2104.02057 has them. Raises ValueError when 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"sines and cosines of rows and columns need a width that 4 divides, not {width}")
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width / 4))
    rows, columns = np.indices((side, side)).reshape(2, -1)
    angles = [place[:, None] * frequencies for place in (rows, columns)]
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, width)), table])[None].astype(np.float32)


def resize_weights(stored: int, target: int, offset: float, antialias: bool) -> np.ndarray:
    """The matrix [target, stored] of one axis of torch's bicubic resize.

    Without antialias a = -0.75, edges clamped, and the scale is (target + offset) / stored: the offset
    moves the grid, and released weights were trained with it. With antialias a = -0.5, windows
    renormalised, and the offset must be 0.
    """
    return _antialiased(stored, target) if antialias else _interpolated(stored, target, offset)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter a."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _interpolated(stored: int, target: int, offset: float) -> np.ndarray:
    centre = (np.arange(target) + 0.5) * stored / (target + offset) - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((target, stored))
    for tap in range(-1, 3):
        index = np.clip(first + tap, 0, stored - 1)  # clamped taps pile up on the edge
        np.add.at(matrix, (np.arange(target), index), _cubic(centre - first - tap, -0.75))
    return matrix.astype(np.float32)


def _antialiased(stored: int, target: int) -> np.ndarray:
    scale = stored / target
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(target)[:, None] + 0.5)
    source = np.arange(stored)[None]
    low = np.maximum((centre - 2 * stretch + 0.5).astype(int), 0)
    high = np.minimum((centre + 2 * stretch + 0.5).astype(int), stored)
    matrix = _cubic((source - centre + 0.5) / stretch, -0.5) * ((source >= low) & (source < high))
    return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
