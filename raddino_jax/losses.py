"""DINO, iBOT and KoLeo losses and the two centrings, as pure array functions.

Everything about prototypes rests on one identity: both centrings make teacher targets of the form
softmax(logits / temperature - bias), with one bias [K] for all rows. Softmax centring has bias =
centre / temperature; Sinkhorn-Knopp ends with the normalisation of each row, so all it leaves is
its factor per prototype, and bias = its logarithm. So targets are rebuilt wherever they are needed from
unit vectors [rows, b] and a bias [K], chunk by chunk, and no [rows, K] array outlives its chunk.

Letters: K prototypes, b bottleneck width, R shards (one per device, so that chunks never cross
devices), n items per shard. Reference: DINOv2 `loss/`, arXiv 2304.07193; Sinkhorn: arXiv 2006.09882.
All arithmetic on logits is float32.
"""

from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array


def _logits(rows: Array, prototypes: Array) -> Array:
    return jnp.einsum(
        "...b,kb->...k", rows, prototypes.astype(rows.dtype), preferred_element_type=jnp.float32
    )


def _chunks(budget: int, shard_rows: int, width: int, prototypes: int) -> int:
    """Number of chunks so that one shard's chunk of logits holds at most `budget` floats."""
    per_chunk = max(budget // (width * prototypes), 1)
    return -(-shard_rows // per_chunk)


def _scan_chunks(body, carry, arrays: tuple, chunks: int):
    """Scan `body(carry, chunk of each array) -> (carry, out)` over chunks of axis 1 of [R, n, ...] arrays.

    Rows that pad the last chunk are zeros: `body` must give them weight 0.
    Returns (carry, outs in the layout of the inputs). One chunk is called directly, so that XLA may
    share its logits between calls.
    """
    if chunks == 1:
        return body(carry, arrays)
    n = arrays[0].shape[1]
    size = -(-n // chunks)

    def fold(x):
        x = jnp.pad(x, [(0, 0), (0, chunks * size - n)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    def unfold(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * size, *x.shape[3:])[:, :n]

    carry, outs = jax.lax.scan(body, carry, tuple(map(fold, arrays)))
    return carry, jax.tree.map(unfold, outs)


# --- centring: from teacher rows to the bias [K] ---------------------------------------------------


def sinkhorn_bias(
    rows: Array, valid: Array, prototypes: Array, temperature: Array, iterations: int = 3, budget: int = 2**26
) -> Array:
    """Logarithm of the prototype factors after Sinkhorn-Knopp over all valid rows, [K].

    rows: unit vectors [R, n, b]. valid: [R, n], 0 for padding. prototypes: [K, b].
    One pass over the logits per iteration. The first starts from unscaled rows and is done in the log domain, since
    exp(logit / 0.02) underflows. Later ones add up rows that sum to one; no prototype's total can underflow there,
    because the row nearest to it keeps at least 1 / (n K). Constants common to all prototypes cancel in the targets and
    are left out. Reference: `sinkhorn_knopp_teacher`.
    """
    shards, n, _ = rows.shape
    k = len(prototypes)
    chunks = _chunks(budget, n, 1, k)

    def first(total, chunk):
        row, ok = chunk
        scaled = jnp.where(ok[..., None] > 0, _logits(row, prototypes) / temperature, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(scaled, axis=1)), None

    def later(bias, total, chunk):
        row, ok = chunk
        shares = jax.nn.softmax(_logits(row, prototypes) / temperature - bias)
        return total + jnp.einsum("rn,rnk->rk", ok, shares, precision="highest"), None

    if not iterations:
        return jnp.zeros(k)
    start = jnp.full((shards, k), -jnp.inf)
    bias = jax.nn.logsumexp(_scan_chunks(first, start, (rows, valid), chunks)[0], axis=0)
    for _ in range(iterations - 1):
        total, _ = _scan_chunks(partial(later, bias), jnp.zeros((shards, k)), (rows, valid), chunks)
        bias += jnp.log(total.sum(axis=0))
    return bias


def centre_bias(centre: Array, temperature: Array) -> Array:
    """The bias [K] of softmax centring: softmax((logits - centre) / temperature)."""
    return centre / temperature


def update_centre(centre: Array, rows: Array, valid: Array, prototypes: Array, momentum: float) -> Array:
    """Moving average [K] of the teacher's mean logits: linear in the rows, so no logits are needed.

    rows [G, n, b], valid [G, n]: the mean is taken inside each group, then over groups, as the reference
    averages devices whatever number of masked patches each has.
    """
    counts = jnp.maximum(valid.sum(axis=1, keepdims=True), 1.0)
    mean = (jnp.einsum("gnb,gn->gb", rows.astype(jnp.float32), valid) / counts).mean(axis=0)
    return momentum * centre + (1 - momentum) * jnp.einsum("b,kb->k", mean, prototypes, precision="highest")


def targets(rows: Array, prototypes: Array, temperature: Array, bias: Array) -> Array:
    """Teacher probabilities [..., K] of rows [..., b]."""
    return jax.nn.softmax(_logits(rows, prototypes) / temperature - bias, axis=-1)


# --- cross-entropy between teacher and student ------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropies(
    students: tuple[Array, ...], prototypes: Array, teachers: tuple[dict, ...], temperature: float, budget: int
) -> tuple[Array, Array]:
    """(sum, each of them [terms]) of several cross-entropies; only the sum has a gradient.

    Each is the sum over items of weight * sum over pairs (s, t) of -sum_k target_t[k] log softmax(student_s)[k].
    students: of each unit vectors [R, n, S, b]; every one of an item's S students is paired with each of its T
      teachers. prototypes: the students' [K, b]. temperature: the students'.
    teachers: of each {"rows" [R, n, T, b], "weight" [R, n] (0 for padding), "prototypes" [K, b], "bias" [K],
      "temperature"}: constants, no gradient.
    budget: logits per shard that may be alive at once, counted over students.
    The gradient is made in the forward pass, while a chunk's logits are at hand, and all terms add to one gradient of
    the prototypes.
    """
    values = _sweep(students, prototypes, teachers, temperature, budget, with_gradient=False)[0]
    return values.sum(), values


def _sweep(students, prototypes, teachers, temperature, budget, with_gradient):
    """One pass over the chunks of every term: (losses, d sum / d students, d sum / d prototypes)."""
    grad = jnp.zeros((len(students[0]), *prototypes.shape[::-1])) if with_gradient else None
    values, grads = [], []
    for student, teacher in zip(students, teachers, strict=True):
        value, grad_student, grad = _term(student, prototypes, teacher, temperature, budget, grad)
        values.append(value)
        grads.append(grad_student)
    return jnp.stack(values), tuple(grads), None if grad is None else grad.sum(axis=0).T


def _term(student, prototypes, teacher, temperature, budget, grad):
    """(loss, d loss / d student, grad + d loss / d prototypes) of one term; no gradients where `grad` is None."""
    shards, n, s, _ = student.shape
    k = len(prototypes)
    with_gradient = grad is not None

    def body(carry, chunk):
        loss, grad = carry
        z, rows, weight = chunk
        target = targets(rows, teacher["prototypes"], teacher["temperature"], teacher["bias"]).sum(axis=2)
        logits = _logits(z, prototypes) / temperature
        norms = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        mass = rows.shape[2]  # each target sums to one
        item = (mass * norms[..., 0] - jnp.einsum("rnk,rnsk->rns", target, logits)).sum(axis=2)
        loss += (weight * item).sum(axis=1)
        if not with_gradient:
            return (loss, grad), None
        slope = (mass * jnp.exp(logits - norms) - target[:, :, None]) * (weight / temperature)[..., None, None]
        slope = jax.lax.optimization_barrier(slope.astype(z.dtype))  # made once, read by both products
        # [b, K]: the other way round would write a transposed copy of the slope first
        grad += jnp.einsum("rnsb,rnsk->rbk", z, slope, preferred_element_type=jnp.float32)
        return (loss, grad), jnp.einsum("rnsk,kb->rnsb", slope, prototypes.astype(z.dtype))

    arrays = (student, teacher["rows"], teacher["weight"])
    (loss, grad), to_student = _scan_chunks(body, (jnp.zeros(shards), grad), arrays, _chunks(budget, n, s, k))
    return loss.sum(), to_student, grad


def _forward(students, prototypes, teachers, temperature, budget):
    values, *grads = _sweep(students, prototypes, teachers, temperature, budget, with_gradient=True)
    return (values.sum(), values), (*grads, teachers)


def _backward(temperature, budget, saved, cotangents):
    grad_students, grad_prototypes, teachers = saved
    of_sum, _ = cotangents
    return (
        jax.tree.map(lambda grad: (of_sum * grad).astype(grad.dtype), grad_students),
        of_sum * grad_prototypes,
        jax.tree.map(jnp.zeros_like, teachers),
    )


cross_entropies.defvjp(_forward, _backward)


# --- KoLeo ----------------------------------------------------------------------------------------


def koleo(cls: Array, eps: float = 1e-8) -> Array:
    """Mean of -log distance to the nearest neighbour inside each group, on the unit sphere.

    cls: backbone features [groups, m, D], in float32 whatever comes in: half precision loses eps, and exact
    duplicates would give infinity. Reference: `koleo_loss.py`; arXiv 1806.03198.
    """
    x = cls.astype(jnp.float32)
    x = x / jnp.maximum(jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-30)), eps)
    dots = jnp.einsum("gmd,gnd->gmn", x, x, precision="highest")
    dots = jnp.where(jnp.eye(x.shape[1], dtype=bool), -1.0, dots)
    nearest = jnp.take_along_axis(x, dots.argmax(axis=-1)[..., None], axis=1)
    distance = jnp.sqrt(((x - nearest + eps) ** 2).sum(-1))
    return -jnp.log(distance + eps).mean()
