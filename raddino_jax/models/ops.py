"""Linear, LayerNorm and GELU with backward passes written by hand: what a step spends its time in.

Left to itself, XLA's CPU backend fuses the gradient that reaches a layer into a transposed copy for its weights'
gradient and into every sum over rows; here that gradient is written out once and each product reads it as it lies. On
every backend the weights' gradient is accumulated and returned in float32, whatever the compute type.
Parameters are named and shaped as in flax's Dense and LayerNorm.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
barrier = jax.lax.optimization_barrier

EPS = 1e-6  # of DINOv2's LayerNorm
STD = 0.02  # of its initial kernels
LINEAR = "linear"  # how remat policies know the outputs of Dense: they do not look inside a custom gradient


def products(dtype) -> contextlib.AbstractContextManager:
    """Inside, what computes in float32 multiplies in it; left alone, TPUs would in bfloat16 and GPUs in TF32.

    dtype: of the computation; half precision stays as it is. To be entered where a function is traced.
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


class Dense(nn.Module):
    """x [..., A] -> x kernel + bias, [..., features], computed in `dtype`."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, before: Callable[[Array], Array] | None = None, gamma: Array | None = None) -> Array:
        """before: a cheap function of x whose value is made again in the backward pass instead of being kept.

        gamma: LayerScale [features] on the output. It goes into kernel and bias: one pass over activations less each
        way, and its own gradient needs no activations at all.
        """
        kernel = self.param("kernel", nn.initializers.normal(STD), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if gamma is not None:
            kernel, bias = kernel * gamma, bias * gamma
        run = linear
        if before is not None:
            run = forgetful(lambda x, *parameters: linear(before(x).astype(self.dtype), *parameters))
        else:
            x = x.astype(self.dtype)
        return checkpoint_name(run(x, kernel, bias), LINEAR)


class LayerNorm(nn.Module):
    """Normalises [..., D] over its last axis as DINOv2 does: two-pass statistics in float32."""

    dtype: jnp.dtype = jnp.float32
    eps: float = EPS

    def __call__(self, x: Array) -> Array:
        return self.rule(x.shape[-1])(x)

    @nn.compact
    def rule(self, width: int) -> Callable[[Array], Array]:
        """The layer as a function, for `Dense(...)(x, before=...)`."""
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        return lambda x: layer_norm(x, scale, bias, self.eps).astype(self.dtype)


def forgetful(function: Callable) -> Callable:
    """The same function of arrays; its backward pass keeps its arguments alone and makes the rest again."""

    def run(*arguments):
        pure, closed_over = jax.closure_convert(function, *arguments)
        return _forgetful(pure, *arguments, *closed_over)

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forgetful(function, *arguments):
    return function(*arguments)


def _again(function, arguments, grad):
    return jax.vjp(function, *(after(x, grad) for x in arguments))[1](grad)


_forgetful.defvjp(lambda function, *arguments: (function(*arguments), arguments), _again)


def after(x: Array, grad: Array) -> Array:
    """x, for a compiler another array that is not there before the gradient is.

    What is made of it in the backward pass cannot be found to be the same as in the forward pass, and kept. A barrier
    says so to most compilers; XLA's for CPUs takes barriers away before it looks for what is computed twice. There x
    hangs on a number of the gradient: where that is not finite x is 0, and the gradient spoiled anyhow.
    """
    return jax.lax.platform_dependent(x, grad, cpu=_hung_on, default=lambda x, grad: barrier((x, grad))[0])


def _hung_on(x, grad):
    if jax.sharding.get_abstract_mesh().size <= 1:
        return jnp.where(jnp.isfinite(grad.reshape(-1)[0]), x, 0)
    # Of several devices each needs a number of its own, or they would have to send it round: one for each row.
    return jnp.where(jnp.isfinite(grad[..., :1]), x, 0) if x.shape[:-1] == grad.shape[:-1] else x


@jax.custom_vjp
def linear(x: Array, kernel: Array, bias: Array) -> Array:
    """x kernel + bias in the type of x; kernel [A, B] and bias [B] stay float32 outside."""
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _linear_forward(x, kernel, bias):
    return linear(x, kernel, bias), (x, kernel)


def _linear_backward(saved, grad):
    x, kernel = saved
    grad = barrier(grad)
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    to_kernel = jnp.einsum("na,nb->ab", rows, grads, preferred_element_type=jnp.float32)
    to_bias = jnp.einsum("n,nb->b", jnp.ones_like(grads[:, 0]), grads, preferred_element_type=jnp.float32)
    grad, to_kernel, to_bias = _first(grad, to_kernel, to_bias)
    return jnp.einsum("...b,ab->...a", grad, kernel.astype(x.dtype)), to_kernel, to_bias


def _first(grad: Array, *of_parameters: Array) -> tuple[Array, ...]:
    """The same values; what is made of `grad` afterwards waits for the parameters' gradients.

    A compiler that may choose puts the parameters' gradients of one crop size off until those of the other, to add
    them up, and keeps all blocks' activations alive meanwhile: on a TPU half of a step's memory.
    """
    return barrier((grad, *of_parameters))


linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias in float32."""
    return _normalized(x, eps)[0] * scale + bias


def _normalized(x, eps):
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return centred * factor, factor


def _norm_forward(x, scale, bias, eps):
    return layer_norm(x, scale, bias, eps), (x, scale)


def _norm_backward(eps, saved, grad):
    x, scale = saved
    normal, factor = _normalized(x, eps)
    rows = tuple(range(x.ndim - 1))
    grad, to_scale, to_bias = _first(grad, (grad * normal).sum(rows), grad.sum(rows))
    slope = grad * scale
    along = (slope * normal).mean(-1, keepdims=True)
    to_x = factor * (slope - slope.mean(-1, keepdims=True) - normal * along)
    return to_x.astype(x.dtype), to_scale, to_bias


layer_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU, x Phi(x), in float32 inside; only x is kept for the backward pass."""
    return (x * _phi(x.astype(jnp.float32))).astype(x.dtype)


def _phi(x):
    """The normal distribution function."""
    return 0.5 * (1 + erf(x * 0.5**0.5))


# erf(x) = x P(x^2) / Q(x^2): coefficients, highest power first, of the rational function that Eigen and XLA use.
_ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
_ERF_Q = (
    -1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667, 0.11098505178285362,
    0.49746925110067538, 1.0,
)  # fmt: skip
_ERF_ONE = 3.832506856900711  # from where on it is 1 in float32


def erf(x: Array) -> Array:
    """The error function in float32, within 4e-7.

    Written out because XLA's CPU backend may call the C library for each number of `jax.lax.erf` (jaxlib 0.10.2): at
    least five times the time.
    """
    x = jnp.clip(x, -_ERF_ONE, _ERF_ONE)
    square = x * x
    return x * jnp.polyval(jnp.float32(_ERF_P), square) / jnp.polyval(jnp.float32(_ERF_Q), square)


def _gelu_backward(x, grad):
    wide = after(x, grad).astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    return ((grad * (_phi(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
