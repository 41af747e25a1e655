"""BERT (arXiv 1810.04805), and CheXbert's 14 classifiers on it (arXiv 2004.09167).

A post-norm transformer: LayerNorm follows each residual sum, eps 1e-12, exact GELU. CheXbert reads the class token
through one linear layer per class of findings.
Letters: n texts, T tokens, D width, H heads.
"""

from collections.abc import Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from raddino_jax.models.ops import Dense, LayerNorm, gelu

Array = jax.Array

EPS = 1e-12
HIDDEN = -1e30  # a score that softmax turns into 0

_normal = nn.initializers.normal(0.02)


class Bert(nn.Module):
    """Tokens int [n, T] with mask [n, T] (1 for tokens, 0 for padding) -> the last layer [n, T, D].

    The defaults are BERT-base. T may be at most `positions`.
    """

    vocabulary: int = 30_522
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Raises ValueError for more tokens than there are positions."""
        if tokens.shape[1] > self.positions:
            raise ValueError(f"expected at most {self.positions} tokens, found {tokens.shape[1]}")
        words = self.param("words", _normal, (self.vocabulary, self.width))
        places = self.param("places", _normal, (self.positions, self.width))
        # The second of two kinds marks the second text of a pair; a report is always the first.
        kinds = self.param("kinds", _normal, (2, self.width))
        x = words[tokens] + places[: tokens.shape[1]] + kinds[0]
        x = LayerNorm(self.dtype, EPS, name="norm")(x)
        for i in range(self.depth):
            x = Layer(self.heads, self.hidden, self.dtype, name=f"layers_{i}")(x, mask)
        return x


class Layer(nn.Module):
    """Attention and feed-forward, each added and then normalised: [n, T, D] -> [n, T, D]."""

    heads: int
    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        width = x.shape[-1]
        attended = SelfAttention(self.heads, self.dtype, name="attn")(x, mask)
        x = LayerNorm(self.dtype, EPS, name="norm1")(x + attended)
        hidden = gelu(Dense(self.hidden, self.dtype, name="fc1")(x))
        return LayerNorm(self.dtype, EPS, name="norm2")(x + Dense(width, self.dtype, name="fc2")(hidden))


class SelfAttention(nn.Module):
    """Every token attends to those that are no padding."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        width = x.shape[-1]
        qkv = Dense(3 * width, self.dtype, name="qkv")(x)
        q, k, v = einops.rearrange(qkv, "n t (three h d) -> three n t h d", three=3, h=self.heads)
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None] > 0, scores, HIDDEN), axis=-1).astype(v.dtype)
        out = einops.rearrange(jnp.einsum("nhqk,nkhd->nqhd", weights, v), "n t h d -> n t (h d)")
        return Dense(width, self.dtype, name="proj")(out)


class CheXbert(nn.Module):
    """Tokens and mask [n, T] -> logits per class, a list of [n, choices]."""

    choices: Sequence[int]
    bert: Bert = Bert()

    @nn.compact
    def __call__(self, tokens: Array, mask: Array) -> list[Array]:
        cls = self.bert(tokens, mask)[:, 0]
        return [Dense(n, self.bert.dtype, name=f"heads_{i}")(cls) for i, n in enumerate(self.choices)]
