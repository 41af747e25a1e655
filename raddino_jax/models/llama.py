"""Llama 2 (arXiv 2307.09288), which Vicuna is, as pure init/apply, with a key-value cache and greedy decoding.

RMSNorm before each branch, rotary positions in the layout of the Hugging Face release (halves, not pairs), SwiGLU.
Letters: n texts, T tokens at a time, S slots of the cache, D width, H heads, d = D / H, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Cache = Sequence[tuple[Array, Array]]  # keys and values [n, S, H, d] of each layer

HIDDEN = -1e30  # a score that softmax turns into 0
QUERIES = 512  # whose scores are held at a time: of 2,048 tokens and 32 heads they are 128 MiB instead of 512
LORA_SCALE = 2.0  # alpha / rank of LLaVA's script
START, END, PADDING = 1, 2, 0  # of the released tokenizer; <unk> serves as padding

_normal = nn.initializers.normal(0.02)


class Llama(nn.Module):
    """Embeddings -> logits; see `__call__`. The defaults are Llama-2-7B and Vicuna-7B v1.5.

    hidden: width of the SwiGLU. theta: base of the rotary frequencies. eps: of RMSNorm. remat: for training at
    full size, layers are one loop, and each is computed again in the backward pass. Variables of the collection "lora"
    are added to the linear layers, see `Linear`.
    """

    vocabulary: int = 32_000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    hidden: int = 11_008
    positions: int = 4096
    theta: float = 10_000.0
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        self.words = self.param("words", _normal, (self.vocabulary, self.width))
        self.layers = [self._layer() for _ in range(self.depth)]
        self.norm = RMSNorm(self.eps, self.dtype)
        self.lm_head = Linear(self.vocabulary, self.dtype)

    def _layer(self, **how) -> "Layer":
        return Layer(self.heads, self.hidden, self.theta, self.eps, self.dtype, **how)

    def embed(self, tokens: Array) -> Array:
        """Tokens int [n, T] -> embeddings [n, T, D], among which those of an image may be put."""
        return _whole(self.words.astype(self.dtype))[tokens]

    def __call__(self, x: Array, mask: Array, cache: Cache = (), start: Array | int = 0) -> tuple[Array, Cache]:
        """Embeddings x [n, T, D] -> (logits [n, T, V] float32, the cache with their keys and values); see `states`."""
        states, written = self.states(x, mask, cache, start)
        return self.logits(states), written

    def logits(self, states: Array) -> Array:
        """The last states of tokens [..., D] -> logits [..., V] float32."""
        return self.lm_head(states).astype(jnp.float32)

    def states(self, x: Array, mask: Array, cache: Cache = (), start: Array | int = 0) -> tuple[Array, Cache]:
        """Embeddings x [n, T, D] -> (what `logits` reads of each token [n, T, D], the cache; none with `remat`).

        mask: bool [n, S] over all slots, false for padding, which may stand on either side. Without a cache S is T.
        start: the slot of the first token of x; slots after a token are never seen by it.
        """
        slots = start + jnp.arange(x.shape[1])
        places = jnp.take(jnp.cumsum(mask, axis=1) - 1, slots, axis=1)
        seen = mask[:, None, :] & (jnp.arange(mask.shape[1]) <= slots[:, None])
        if self.remat and not cache and not self.is_initializing():
            return self.norm(self._looped(x, places, seen)), ()
        written = []
        for i, layer in enumerate(self.layers):
            x, pair = layer(x, places, seen, *((cache[i], start) if cache else ()))
            written.append(pair)
        return self.norm(x), written

    def _looped(self, x: Array, places: Array, seen: Array) -> Array:
        """The states after all layers. One layer is compiled, not 32, and one is gathered at a time."""
        layer = self._layer(parent=None)

        @jax.checkpoint
        def one(x, variables):
            return layer.apply(variables, x, places, seen)[0], None

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer.variables for layer in self.layers))
        return jax.lax.scan(one, x, stacked)[0]

    def empty(self, n: int, slots: int) -> Cache:
        """A cache for n texts of at most `slots` tokens."""
        zeros = jnp.zeros((n, slots, self.heads, self.width // self.heads), self.dtype)
        return [(zeros, zeros)] * self.depth


class Layer(nn.Module):
    """Attention and feed-forward, each on the normalised sum so far: [n, T, D] -> [n, T, D]."""

    heads: int
    hidden: int
    theta: float
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, places: Array, seen: Array, cache=None, start=0) -> tuple[Array, tuple[Array, Array]]:
        attention = Attention(self.heads, self.theta, self.dtype, name="attn")
        attended, pair = attention(RMSNorm(self.eps, self.dtype, name="norm1")(x), places, seen, cache, start)
        x = x + attended
        y = RMSNorm(self.eps, self.dtype, name="norm2")(x)
        gate, up = (Linear(self.hidden, self.dtype, name=name)(y) for name in ("gate", "up"))
        return x + Linear(x.shape[-1], self.dtype, name="down")(nn.silu(gate) * up), pair


class Attention(nn.Module):
    """A token attends to the slots in `seen` [n, T, S]."""

    heads: int
    theta: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, places: Array, seen: Array, cache=None, start=0) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = (
            einops.rearrange(Linear(x.shape[-1], self.dtype, name=name)(x), "n t (h d) -> n t h d", h=self.heads)
            for name in "qkv"
        )
        q, k = (rotate(y, places, self.theta) for y in (q, k))
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
        out = attend(q, k, v, seen, start)
        return Linear(x.shape[-1], self.dtype, name="o")(einops.rearrange(out, "n t h d -> n t (h d)")), (k, v)


def attend(q: Array, k: Array, v: Array, seen: Array, start: Array | int = 0) -> Array:
    """Queries [n, T, H, d] over those slots [n, S, H, d] that they have `seen` [n, T, S] -> [n, T, H, d].

    Long texts go QUERIES at a time, whose scores the backward pass makes again. Where the slot of the first query,
    `start`, is known while compiling, slots after a block, which it never sees, are left out.
    """
    tokens, slots = seen.shape[1:]
    if tokens <= QUERIES:
        return _attend(q, k, v, seen)
    block, parts = jax.checkpoint(_attend), []
    for first in range(0, tokens, QUERIES):
        rows = slice(first, first + QUERIES)
        end = min(start + first + QUERIES, slots) if isinstance(start, int) else slots
        parts.append(block(q[:, rows], k[:, :end], v[:, :end], seen[:, rows, :end]))
    return jnp.concatenate(parts, axis=1)


def _attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    precision = _precision(q.dtype)
    scores = jnp.einsum("nthd,nshd->nhts", q, k, precision=precision) / (q.shape[-1] ** 0.5)
    scores = jnp.where(seen[:, None], scores.astype(jnp.float32), HIDDEN)
    return jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores).astype(q.dtype), v, precision=precision)


class Linear(nn.Module):
    """x [..., A] -> x kernel [..., features], without bias.

    Where the collection "lora" has `a` [A, r] and `b` [r, features] for it, LORA_SCALE x a b is added
    (arXiv 2106.09685): the product of two narrow matrices, which alone are trained then.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", _normal, (x.shape[-1], self.features))
        matrices = [kernel]
        if self.has_variable("lora", "a"):
            matrices += [self.get_variable("lora", "a"), self.get_variable("lora", "b") * LORA_SCALE]
        x = x.astype(self.dtype)
        product = partial(jnp.dot, precision=_precision(self.dtype))
        kernel, *narrow = (_whole(matrix.astype(self.dtype)) for matrix in matrices)
        out = product(x, kernel)
        return out + product(product(x, narrow[0]), narrow[1]) if narrow else out


class RMSNorm(nn.Module):
    """x [..., D] / root mean square x scale; the statistics in float32."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


def rotate(x: Array, places: Array, theta: float) -> Array:
    """x [n, T, H, d] turned by its places int [n, T]: component i together with i + d/2."""
    half = x.shape[-1] // 2
    angles = places[..., None, None] * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def greedy(model: Llama, params, x: Array, mask: Array, limit: int, end: int = END) -> Array:
    """Prompts as embeddings x [n, T, D] -> the likeliest tokens int [n, limit], one after the other.

    mask: bool [n, T], false for padding on either side; each prompt has a token at least. A text ends with `end`,
    and PADDING follows. To be jitted with model, limit and end static. Raises ValueError for too many positions.
    """
    n, length = mask.shape
    if length + limit > model.positions:
        raise ValueError(f"expected at most {model.positions} positions, found {length} + {limit} new ones")
    # The slots of new tokens count from the start: a token never sees the slots after its own.
    mask = jnp.concatenate([mask.astype(bool), jnp.ones((n, limit), bool)], axis=1)
    logits, cache = model.apply({"params": params}, x, mask, model.empty(n, length + limit))
    last = length - 1 - jnp.argmax(mask[:, :length][:, ::-1], axis=1)
    token = jnp.argmax(logits[jnp.arange(n), last], axis=-1)

    def unfinished(state):
        step, _, done, *_ = state
        return (step < limit) & ~jnp.all(done)

    def write(state):
        step, token, done, texts, cache = state
        token = jnp.where(done, PADDING, token)
        texts, done = texts.at[:, step].set(token), done | (token == end)
        x = model.apply({"params": params}, token[:, None], method="embed")
        logits, cache = model.apply({"params": params}, x, mask, cache, length + step)
        return step + 1, jnp.argmax(logits[:, 0], axis=-1), done, texts, cache

    texts = jnp.full((n, limit), PADDING, token.dtype)
    state = (0, token, jnp.zeros(n, bool), texts, cache)
    return jax.lax.while_loop(unfinished, write, state)[3]


def _whole(weights: Array) -> Array:
    """Weights on every device of the mesh that is set, if one is: they travel, and texts stay where they are."""
    return weights if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(weights, jax.P())


def _precision(dtype) -> jax.lax.Precision | None:
    """Float32 is meant: without this a TPU multiplies in bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
