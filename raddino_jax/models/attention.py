"""Self-attention, one function for all backends: the same numbers by the fastest way each has.

Letters: n crops, T tokens, H heads, d head width (64 in every ViT here).
"""

import einops
import jax
import jax.numpy as jnp

Array = jax.Array
barrier = jax.lax.optimization_barrier

# From so many tokens on a CPU goes head by head, QUERIES queries at a time: the scores then stay in its cache. For two
# films of 1370 tokens 107 ms against 280 ms for a head of all films at once; short sequences are faster all at once.
LONG = 512
QUERIES = 700

TILE = 128  # lanes of a TPU: sequences are padded to a multiple
SPLASH_BLOCKS = (
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
    "block_kv_dq",
)


def attention(q: Array, k: Array, v: Array, backend: str = "xla") -> Array:
    """softmax(q k^T / sqrt(d)) v over [n, T, H, d]; the softmax is computed in float32.

    backend: "xla" all heads in one product, "cpu" the same for short sequences and head by head
    for long ones, "gpu" cuDNN, which takes half precision only and falls back to "xla" in float32, "tpu" splash
    attention for long sequences in half precision, on every device its own crops, and "xla" in float32 and for short
    ones, which padding would make a third longer.
    """
    return BACKENDS[backend](q, k, v)


def weights(q: Array, k: Array) -> Array:
    """The attention probabilities [n, H, T, T] themselves, for figures."""
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)


def _xla(q: Array, k: Array, v: Array) -> Array:
    return jnp.einsum("nhqk,nkhd->nqhd", weights(q, k).astype(v.dtype), v)


def _cpu(q: Array, k: Array, v: Array) -> Array:
    # Plain batches of products, each operand written out as they read it: a quarter less time than `_xla`.
    n, tokens = q.shape[:2]
    flat = [einops.rearrange(x, "n t h d -> (n h) t d") for x in (q * q.shape[-1] ** -0.5, k, v)]
    q, k, v = barrier(flat)
    if tokens < LONG:
        out = _all_heads(q, k, v)
    else:
        blocks = -(-tokens // QUERIES)
        q = jnp.pad(q, [(0, 0), (0, -tokens % blocks), (0, 0)])
        out = jax.lax.map(_one_head, (einops.rearrange(q, "b (i q) d -> b i q d", i=blocks), k, v))
        out = einops.rearrange(out, "b i q d -> b (i q) d")[:, :tokens]
    return einops.rearrange(out, "(n h) t d -> n t h d", n=n)


@jax.custom_vjp
def _all_heads(q: Array, k: Array, v: Array) -> Array:
    """Attention [b, t, d] of scaled queries; nothing as large but the probabilities is kept for the gradient."""
    return _probably(q, k, v)[0]


def _probably(q, k, v):
    scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
    probabilities = barrier(jax.nn.softmax(scores, axis=-1).astype(v.dtype))
    return barrier(jnp.einsum("bqk,bkd->bqd", probabilities, v)), (q, k, v, probabilities)


def _all_heads_backward(saved, grad):
    q, k, v, probabilities = saved
    to_v = barrier(jnp.einsum("bqk,bqd->bkd", probabilities, grad))
    slopes = barrier(jnp.einsum("bqd,bkd->bqk", grad, v, preferred_element_type=jnp.float32))
    slopes -= (probabilities * slopes).sum(-1, keepdims=True)
    slopes = barrier((probabilities * slopes).astype(v.dtype))
    return barrier(jnp.einsum("bqk,bkd->bqd", slopes, k)), barrier(jnp.einsum("bqk,bqd->bkd", slopes, q)), to_v


_all_heads.defvjp(_probably, _all_heads_backward)


@jax.checkpoint  # scores are made again in the backward pass: those of all heads are never held
def _one_head(given: tuple[Array, Array, Array]) -> Array:
    """Blocks of queries [i, q, d] of one head, one after the other, against keys and values [t, d]."""
    queries, k, v = given

    def block(q):
        scores = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32)
        scores = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        return (scores.astype(v.dtype) @ v / scores.sum(axis=-1, keepdims=True)).astype(v.dtype)

    return jax.lax.map(block, queries)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    if q.dtype == jnp.float32:
        return _xla(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _tpu(q: Array, k: Array, v: Array) -> Array:
    if q.shape[1] < LONG or q.dtype == jnp.float32:  # whose tiles would not fit into a core's fast memory
        return _xla(q, k, v)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash(q, k, v)
    # A kernel cannot be partitioned: each device runs it on its crops, or on all where they cannot be shared out.
    crops = jax.P(mesh.axis_names) if len(q) % mesh.size == 0 else jax.P()
    return jax.shard_map(_splash, in_specs=(crops, crops, crops), out_specs=crops, check_vma=False)(q, k, v)


def _splash(q: Array, k: Array, v: Array, interpret: bool = False) -> Array:
    """Splash attention on [n, T, H, d], padded to whole tiles; padding is a segment that no token attends to."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, heads = q.shape[1:3]
    length = -(-tokens // TILE) * TILE
    blocks = splash.BlockSizes(**{name: length if "compute" not in name else TILE for name in SPLASH_BLOCKS})
    mask = masks.MultiHeadMask([masks.FullMask((length, length))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
    segment = jnp.where(jnp.arange(length) < tokens, 0, 1)

    def padded(x):
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, length - tokens), (0, 0)])

    run = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=splash.SegmentIds(segment, segment)))
    out = run(padded(q * q.shape[-1] ** -0.5), padded(k), padded(v))
    return jnp.swapaxes(out[:, :, :tokens], 1, 2).astype(q.dtype)


BACKENDS = {"xla": _xla, "cpu": _cpu, "gpu": _cudnn, "tpu": _tpu}
