"""Projection heads of DINO and iBOT: an MLP onto a unit sphere, then cosine logits to prototypes.

The head stops at the sphere (`DINOHead.__call__`); the product with the prototypes belongs to the losses,
which never hold all logits at once. Reference: DINOv2 `layers/dino_head.py`; arXiv 2401.10815, E.1.
Letters: K prototypes, b bottleneck width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from raddino_jax.models.ops import Dense, gelu

Array = jax.Array


def uniform(bound: float):
    """Initialiser U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def normalize(x: Array, eps: float = 1e-12) -> Array:
    """x / max(|x|, eps) along the last axis in float32, with a finite gradient at the zero vector."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps * eps))


class DINOHead(nn.Module):
    """x [..., D] -> unit vectors [..., bottleneck]; holds the prototypes as `last_layer`."""

    prototypes: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        widths = [self.hidden] * (self.layers - 1) + [self.bottleneck]
        for i, width in enumerate(widths):
            # Names as torch gives them: nn.Sequential counts the GELUs too, a single layer has no number.
            name = f"mlp_{2 * i}" if self.layers > 1 else "mlp"
            x = Dense(width, self.dtype, name=name)(x)
            if i < len(widths) - 1:
                x = gelu(x)
        Prototypes(self.prototypes, self.bottleneck, name="last_layer")()
        return normalize(x).astype(self.dtype)


class Prototypes(nn.Module):
    """Weight-normalised rows W_k = g_k v_k / |v_k|; both g and v are trained."""

    prototypes: int
    bottleneck: int

    @nn.compact
    def __call__(self) -> None:
        self.param("weight_g", nn.initializers.ones, (self.prototypes, 1))
        self.param("weight_v", uniform(self.bottleneck**-0.5), (self.prototypes, self.bottleneck))


def prototypes(head_params: dict) -> Array:
    """The rows W [K, bottleneck], float32, of a head's parameters: logits are z @ W.T."""
    layer = head_params["last_layer"]
    return layer["weight_g"] * normalize(layer["weight_v"])
