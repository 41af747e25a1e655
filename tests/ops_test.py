"""The hand-written backward passes against autodiff of the plain formulas, and against flax's own layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from raddino_jax.models import ops

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 8)), jnp.float32)


def _gradients(f, *args):
    """Value and gradients of a sum with uneven weights, so that no error cancels."""
    def total(*args):
        out = f(*args).astype(jnp.float32)
        return (out * jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()

    return jax.value_and_grad(total, argnums=tuple(range(len(args))))(*args)


def _plain_linear(x, kernel, bias):
    return x @ kernel + bias


def _plain_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + ops.EPS) * scale + bias


def test_erf_is_that_of_scipy():
    x = np.concatenate([np.linspace(-7, 7, 100_001), [-np.inf, -3e38, -1e-30, 0, 1e-30, 3e38, np.inf]])
    np.testing.assert_allclose(jax.jit(ops.erf)(np.float32(x)), scipy.special.erf(x), rtol=5e-7, atol=4e-7)
    assert np.isnan(ops.erf(jnp.nan))


def _weights(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    "ours, plain, args",
    [
        (ops.linear, _plain_linear, (X, _weights(8, 6), _weights(6))),
        (lambda *a: ops.layer_norm(*a, ops.EPS), _plain_norm, (X, _weights(8), _weights(8))),
        (lambda *a: ops.layer_norm(*a, ops.EPS), _plain_norm, (X + 1e3, _weights(8), _weights(8))),
        (ops.gelu, lambda x: jax.nn.gelu(x, approximate=False), (4 * X,)),
    ],
    ids=["linear", "layer_norm", "layer_norm far from zero", "gelu"],
)
def test_gradients_are_those_of_the_plain_formula(ours, plain, args):
    (value, grads), (expected, expected_grads) = _gradients(ours, *args), _gradients(plain, *args)
    tolerance = 2e-3 if np.abs(args[0]).max() > 100 else 2e-5  # float32 keeps 7 digits of 1000.3
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)
    for grad, known in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, known, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "ours, flaxs",
    [
        (ops.Dense(6), nn.Dense(6, kernel_init=nn.initializers.normal(0.02))),
        (ops.LayerNorm(), nn.LayerNorm(epsilon=ops.EPS, use_fast_variance=False)),
    ],
)
def test_parameters_and_values_are_those_of_flax(ours, flaxs):
    params, theirs = ours.init(jax.random.key(3), X), flaxs.init(jax.random.key(3), X)
    jax.tree.map(np.testing.assert_array_equal, params, theirs)
    np.testing.assert_allclose(ours.apply(params, X), flaxs.apply(params, X), atol=1e-6)


def test_half_precision_computes_in_half_and_accumulates_the_weights_gradient_in_float32():
    kernel, bias = _weights(8, 6), _weights(6)
    x = X.astype(jnp.bfloat16)
    assert ops.linear(x, kernel, bias).dtype == jnp.bfloat16
    _, (to_x, to_kernel, to_bias) = _gradients(ops.linear, x, kernel, bias)
    assert to_x.dtype == jnp.bfloat16 and to_kernel.dtype == to_bias.dtype == jnp.float32
    rows = jnp.repeat(x.reshape(-1, 8), 400, axis=0)  # 6,000 rows: a sum that bfloat16 cannot hold
    _, (_, _, counted) = _gradients(lambda x, k, b: jnp.abs(ops.linear(x, 0 * k, 0 * b) + b), rows, kernel, bias)
    assert counted.dtype == jnp.float32
    ones = jax.grad(lambda b: ops.linear(rows, kernel, b).astype(jnp.float32).sum())(bias)
    np.testing.assert_allclose(ones, 6000.0)


def test_gelu_in_half_precision_is_the_rounded_exact_one():
    x = jnp.linspace(-6, 6, 97).astype(jnp.bfloat16)
    exact = jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    np.testing.assert_allclose(ops.gelu(x).astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)  # half a unit of 8 bits


class Stack(nn.Module):
    """Six blocks of LayerNorm, linear, GELU, linear, on a residual stream."""

    @nn.compact
    def __call__(self, x):
        for i in range(6):
            norm = ops.LayerNorm(name=f"norm_{i}").rule(x.shape[-1])
            hidden = ops.Dense(4 * x.shape[-1], name=f"up_{i}")(x, norm)
            x = x + ops.Dense(x.shape[-1], name=f"down_{i}")(hidden, ops.gelu)
        return x


def test_a_compiled_backward_pass_keeps_the_stream_and_the_hidden_layers_and_makes_the_rest_again():
    """In arrays the size of the stream: 6 x (1 + 4) are kept; with what norms and GELUs give, twice as many."""
    model, x = Stack(), jnp.ones((1024, 64))
    params = model.init(jax.random.key(0), x)
    step = jax.jit(jax.grad(lambda params, x: model.apply(params, x).sum()))
    memory = step.lower(params, x).compile().memory_analysis()
    assert 30 <= memory.temp_size_in_bytes / x.nbytes < 45


def test_what_is_made_again_has_the_gradient_of_what_is_kept_and_spoiled_gradients_stay_spoiled():
    kernel, scale = _weights(8, 6), _weights(8)
    plain = lambda x, kernel, scale: jnp.tanh(x * scale) @ kernel  # noqa: E731
    found = _gradients(lambda x, k, s: ops.forgetful(lambda x, k: plain(x, k, s))(x, k), X, kernel, scale)
    expected = _gradients(plain, X, kernel, scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)
    for bad in (jnp.nan, jnp.inf):
        _, pull = jax.vjp(ops.gelu, X)
        assert not np.isfinite(pull(jnp.full(X.shape, bad))[0]).any()
