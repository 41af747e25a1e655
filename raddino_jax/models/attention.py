"""Self-attention, one function for all backends: the same numbers by the fastest way each has.

Letters: n crops, T tokens, H heads, d head width (64 in every ViT here).
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def attention(q: Array, k: Array, v: Array, backend: str = "xla") -> Array:
    """softmax(q k^T / sqrt(d)) v over [n, T, H, d]; the softmax is computed in float32.

    backend: "xla" all heads in one product, "cpu" head by head, which never holds the [n, H, T, T]
    scores of all heads (50 ms against 289 ms for one 1370-token crop), "gpu" cuDNN, which
    takes half precision only and falls back to "xla" in float32.
    """
    return BACKENDS[backend](q, k, v)


def weights(q: Array, k: Array) -> Array:
    """The attention probabilities [n, H, T, T] themselves, for figures."""
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)


def _xla(q: Array, k: Array, v: Array) -> Array:
    return jnp.einsum("nhqk,nkhd->nqhd", weights(q, k).astype(v.dtype), v)


def _head_by_head(q: Array, k: Array, v: Array) -> Array:
    heads = [_xla(q[:, :, h : h + 1], k[:, :, h : h + 1], v[:, :, h : h + 1]) for h in range(q.shape[2])]
    return jnp.concatenate(heads, axis=2)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    if q.dtype == jnp.float32:
        return _xla(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


BACKENDS = {"xla": _xla, "cpu": _head_by_head, "gpu": _cudnn, "tpu": _xla}
