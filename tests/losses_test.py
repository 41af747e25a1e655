"""Losses and centrings against plain formulas over all logits, in float64 where it matters.

Letters: K prototypes, b bottleneck width, R shards, n items per shard, S students and T teachers of
an item.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raddino_jax import losses

K, B = 29, 6


def _unit(*shape, seed=0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


# --- cross-entropy ------------------------------------------------------------------------------


def _pairs(shards, n, s, t, dtype=jnp.float32):
    """Students, the students' prototypes, and a teacher whose last items are padding."""
    weight = np.random.default_rng(1).random((shards, n)).astype(np.float32)
    weight[:, -2:] = 0
    rows = _unit(shards, n, t, B, seed=2)
    rows[:, -2:] = 0
    teacher = {
        "rows": jnp.asarray(rows, dtype),
        "weight": jnp.asarray(weight),
        "prototypes": jnp.asarray(1.1 * _unit(K, B, seed=3)),
        "bias": jnp.asarray(np.random.default_rng(4).normal(size=K), jnp.float32),
        "temperature": jnp.float32(0.05),
    }
    student = jnp.asarray(_unit(shards, n, s, B, seed=5), dtype)
    return student, jnp.asarray(0.9 * _unit(K, B, seed=6)), teacher


def _plain(student, prototypes, teacher, temperature=0.1):
    """Every student of an item against each of its teachers, all logits at once."""
    dot = functools.partial(jnp.einsum, precision="highest")
    taught = dot("rntb,kb->rntk", teacher["rows"], teacher["prototypes"])
    target = jax.nn.softmax(taught / teacher["temperature"] - teacher["bias"], axis=-1)
    logits = dot("rnsb,kb->rnsk", student, prototypes) / temperature
    pairs = -jnp.einsum("rntk,rnsk->rnst", target, jax.nn.log_softmax(logits, axis=-1))
    return (teacher["weight"] * pairs.sum((2, 3))).sum()


LAYOUTS = [  # R, n, S, T, budget
    (1, 11, 1, 1, 1),  # an item at a time
    (3, 7, 2, 1, 3 * 2 * K),  # chunks of three items, the last one short
    (2, 5, 3, 2, 2**26),
    (2, 5, 3, 2, 2 * 3 * K + 1),
]


def _cross_entropy(student, prototypes, teacher, temperature, budget):
    """A single term."""
    return losses.cross_entropies((student,), prototypes, (teacher,), temperature, budget)[0]


@pytest.mark.parametrize("shards, n, s, t, budget", LAYOUTS)
def test_cross_entropy_and_its_gradients_equal_autodiff_over_all_logits(shards, n, s, t, budget):
    student, prototypes, teacher = _pairs(shards, n, s, t)

    def ours(student, prototypes):
        return 3 * _cross_entropy(student, prototypes, teacher, 0.1, budget)

    def plain(student, prototypes):
        return 3 * _plain(student, prototypes, teacher)

    @jax.jit
    def run(*args):
        return *(jax.value_and_grad(f, argnums=(0, 1))(*args) for f in (ours, plain)), ours(*args)

    (value, grads), (expected, expected_grads), without_gradient = run(student, prototypes)
    np.testing.assert_allclose([value, without_gradient], expected, rtol=1e-5)  # float32
    for grad, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(grads[0][:, -2:], 0)  # padding


def test_cross_entropy_teaches_the_teacher_nothing():
    student, prototypes, teacher = _pairs(1, 5, 1, 1)
    grad = jax.jit(jax.grad(_cross_entropy, argnums=2), static_argnums=(3, 4))
    for name, value in grad(student, prototypes, teacher, 0.1, 2 * K).items():
        np.testing.assert_array_equal(value, 0, err_msg=name)


def test_cross_entropy_of_a_sure_teacher_and_a_student_that_agrees_or_not():
    """Logits 10 and 0 with temperature 0.1: log(e^10 + 3) - 10 where they agree, without -10 else."""
    eye = jnp.eye(4)
    taught = {
        "rows": eye[None, :2, None], "weight": jnp.array([[1.0, 0.5]]), "prototypes": eye,
        "bias": jnp.zeros(4), "temperature": 0.001,
    }  # fmt: skip
    student = np.eye(4, dtype=np.float32)[None, [0, 2], None]
    value = jax.jit(_cross_entropy, static_argnums=(3, 4))(student, eye, taught, 0.1, 2**26)
    lse = np.log(np.exp(10) + 3)
    np.testing.assert_allclose(value, (lse - 10) + 0.5 * lse, rtol=1e-6)  # float32


def _arrays(jaxpr):
    """The shape of everything computed in a jaxpr and in the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _arrays(inner)


@pytest.mark.parametrize("budget", [K, 4 * K, 10 * K])
def test_no_shard_ever_holds_more_logits_than_the_budget(budget):
    shards, n = 2, 50
    student, prototypes, teacher = _pairs(shards, n, 1, 1)

    def step(student, prototypes, rows):
        valid = jnp.ones((shards, n))
        bias = losses.sinkhorn_bias(rows[:, :, 0], valid, teacher["prototypes"], 0.05, 3, budget)
        taught = teacher | {"rows": rows, "bias": bias}
        return _cross_entropy(student, prototypes, taught, 0.1, budget)

    trace = jax.make_jaxpr(jax.grad(step, argnums=(0, 1)))(student, prototypes, teacher["rows"])
    of_prototypes = (student.shape[-1], K)  # their gradient, [shards, b, K], is no logits
    logits = [s for s in _arrays(trace.jaxpr) if len(s) > 2 and s[-1] == K and s[-2:] != of_prototypes]
    sizes = [int(np.prod(shape)) for shape in logits]
    assert sizes and max(sizes) <= shards * budget, logits
    assert max(sizes) > shards * budget / 2  # the budget is used, too


def test_half_precision_students_get_half_precision_gradients_close_to_the_exact_ones():
    student, prototypes, teacher = _pairs(1, 9, 1, 1, jnp.bfloat16)
    value, grads = jax.jit(
        jax.value_and_grad(_cross_entropy, argnums=(0, 1)), static_argnums=(3, 4)
    )(student, prototypes, teacher, 0.1, 4 * K)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    exact = [jnp.float32(student), prototypes, teacher | {"rows": jnp.float32(teacher["rows"])}]
    expected, wanted = jax.jit(jax.value_and_grad(_plain, argnums=(0, 1)))(*exact)
    np.testing.assert_allclose(value, expected, rtol=0.01)  # bf16 has eight bits
    for grad, want in zip(grads, wanted, strict=True):
        error = np.linalg.norm(np.float32(grad) - want) / np.linalg.norm(want)
        assert error < 0.03


# --- Sinkhorn-Knopp -----------------------------------------------------------------------------


def _literal_sinkhorn(logits, temperature, iterations=3):
    """The reference's loop over exp(logits / temperature) [n, K], in float64."""
    q = np.exp(np.asarray(logits, np.float64) / temperature).T
    k, n = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * k
        q /= q.sum(axis=0, keepdims=True) * n
    return (q * n).T


@functools.partial(jax.jit, static_argnums=(4, 5))
def _targets(rows, valid, prototypes, temperature, iterations=3, budget=2**26):
    bias = losses.sinkhorn_bias(rows, valid, prototypes, temperature, iterations, budget)
    return losses.targets(rows, prototypes, temperature, bias), bias


def _logits(rows, prototypes):
    return np.asarray(rows, np.float64) @ np.asarray(prototypes, np.float64).T


@pytest.mark.parametrize("temperature, iterations", [(0.07, 1), (0.04, 2), (0.04, 3), (0.02, 3)])
def test_sinkhorn_targets_equal_the_literal_loop_even_at_a_low_temperature(temperature, iterations):
    """exp(logit / 0.02) spans e^-55 to e^55: float32 holds it in the log domain alone."""
    rows, prototypes = _unit(1, 23, B, seed=7), 1.1 * _unit(K, B, seed=8)
    found, _ = _targets(rows, np.ones((1, 23)), prototypes, temperature, iterations)
    expected = _literal_sinkhorn(_logits(rows[0], prototypes), temperature, iterations)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-8)  # float32
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("budget", [2**26, 3 * K])
def test_sinkhorn_joins_shards_and_leaves_padding_out(budget):
    """Shards of 7, 0 and 4 valid rows, as one group of 11."""
    rows, prototypes = _unit(3, 7, B, seed=9), _unit(K, B, seed=10)
    valid = np.arange(7) < np.array([7, 0, 4])[:, None]
    rows[~valid] = 3.0  # whatever stands in the padding
    found, _ = _targets(rows, valid.astype(np.float32), prototypes, 0.05, 3, budget)
    expected = _literal_sinkhorn(_logits(rows[valid], prototypes), 0.05)
    np.testing.assert_allclose(np.asarray(found)[valid], expected, rtol=1e-4, atol=1e-8)  # float32


def test_sinkhorn_follows_a_permutation_of_prototypes_and_ignores_one_of_rows():
    rows, prototypes = _unit(1, 23, B, seed=7), _unit(K, B, seed=8)
    rng, ones = np.random.default_rng(11), np.ones((1, 23))
    rows_order, order = rng.permutation(23), rng.permutation(K)
    _, bias = _targets(rows, ones, prototypes, 0.04)
    _, permuted = _targets(rows[:, rows_order], ones, prototypes[order], 0.04)
    np.testing.assert_allclose(permuted, bias[order], atol=2e-5)  # float32, of about 10


def test_more_iterations_use_the_prototypes_more_equally():
    rows, prototypes = _unit(1, 23, B, seed=7), _unit(K, B, seed=8)
    used = [
        np.asarray(_targets(rows, np.ones((1, 23)), prototypes, 0.1, iterations)[0][0].sum(0))
        for iterations in (3, 12)
    ]
    errors = [np.abs(share / (23 / K) - 1).max() for share in used]
    assert errors[1] < 0.02 < 0.1 < errors[0], errors


# --- softmax centring ---------------------------------------------------------------------------


def test_softmax_centring_subtracts_the_centre_before_the_temperature():
    rows, prototypes = _unit(5, B), _unit(K, B, seed=1)
    centre = np.random.default_rng(2).normal(size=K).astype(np.float32) / 5
    found = losses.targets(rows, prototypes, 0.04, losses.centre_bias(centre, 0.04))
    expected = _softmax((_logits(rows, prototypes) - centre) / 0.04)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)  # float32


def test_a_centre_moves_by_the_mean_over_groups_of_the_mean_logits_in_each():
    """Groups of 4 and 1 valid rows count alike, as devices do in the reference."""
    rows, prototypes = _unit(2, 4, B), 1.2 * _unit(K, B, seed=1)
    valid = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], np.float32)
    centre = np.random.default_rng(2).normal(size=K).astype(np.float32)
    logits = _logits(rows, prototypes)
    mean = (logits[0].mean(0) + logits[1, 0]) / 2
    found = losses.update_centre(centre, jnp.asarray(rows), valid, prototypes, 0.9)
    np.testing.assert_allclose(found, 0.9 * centre + 0.1 * mean, atol=1e-6)  # float32


# --- KoLeo --------------------------------------------------------------------------------------


def _literal_koleo(x):
    """One group [m, D], pair by pair."""
    x = np.asarray(x, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)
    total = 0.0
    for i, row in enumerate(x):
        others = [j for j in range(len(x)) if j != i]
        nearest = max(others, key=lambda j: row @ x[j])
        total -= np.log(np.linalg.norm(row - x[nearest] + 1e-8) + 1e-8)
    return total / len(x)


_koleo = jax.jit(jax.value_and_grad(losses.koleo))


def test_koleo_equals_brute_force_inside_each_group():
    """The second group is nearly the first one: across groups every neighbour would be closer."""
    x = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    x[1] = x[0] + 1e-3
    value, _ = _koleo(x)
    np.testing.assert_allclose(value, np.mean([_literal_koleo(g) for g in x]), rtol=1e-5)  # float32


def test_koleo_ignores_the_length_of_a_feature_and_the_order_of_a_group():
    x = np.random.default_rng(1).normal(size=(2, 4, 8)).astype(np.float32)
    lengths = np.random.default_rng(2).uniform(0.1, 9, (2, 4, 1)).astype(np.float32)
    np.testing.assert_allclose(_koleo(x)[0], _koleo((x * lengths)[:, ::-1])[0], rtol=1e-5)


def test_koleo_pushes_a_feature_away_from_its_nearest_neighbour():
    x = np.random.default_rng(1).normal(size=(2, 4, 8)).astype(np.float32)
    x[0, 3] = x[0, 0] + 0.1
    step = x - 0.001 * _koleo(x)[1]
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    before, after = (unit(y[0, 0]) @ unit(y[0, 3]) for y in (x, step))
    assert after < before


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_duplicates_and_zero_vectors_give_finite_koleo_and_gradients(dtype):
    x = np.random.default_rng(3).normal(size=(2, 4, 8))
    x[0, 1], x[1, 2:] = x[0, 0], 0
    x = jnp.asarray(x, dtype)
    value, grad = _koleo(x)
    assert np.isfinite(np.float32(grad)).all()
    # The distance of two duplicates is 1e-8 to 1e-7 in float32: log 10 for 2 rows of 8 at most.
    np.testing.assert_allclose(value, np.mean([_literal_koleo(g) for g in x]), atol=0.6)


def test_a_group_of_one_has_the_constant_of_the_reference():
    value, grad = _koleo(np.ones((1, 1, 4), np.float32))
    np.testing.assert_allclose(value, -np.log(np.sqrt(4) * 1e-8 + 1e-8), rtol=1e-5)
    np.testing.assert_allclose(grad, 0, atol=1e-3)
