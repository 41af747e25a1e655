"""The objective against its formulas, term by term, and what must not change it.

Letters: B images, V local crops, N patches, K prototypes, G groups, U masked tokens a group may have.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from raddino_jax import masking
from raddino_jax import params as trees
from raddino_jax.models.heads import DINOHead, prototypes
from raddino_jax.objective import Objective, masked_tokens

IMAGES, LOCAL, PATCHES, TEMPERATURE = 8, 2, 16, 0.05
TERMS = ("dino_global", "dino_local", "ibot", "koleo")


# --- a backbone of a few lines: the transformer has a test of its own ---------------------------


@dataclasses.dataclass(frozen=True)
class Patchwork:
    """Crops of whole patches -> patch tokens, and their mean as class token. xp: numpy or jax.numpy.

    A crop that takes part in a branch (`subsets`) counts one more for each branch.
    """

    width: int = 6
    image_size: int = 8
    patch_size: int = 2
    seen: list = dataclasses.field(default_factory=list, compare=False)  # every call's shapes

    def init(self, key, images):
        kernel, token = jnp.zeros((4, self.width)), jnp.zeros((1, self.width))
        return {"params": {"kernel": kernel, "mask_token": token}}

    def apply(self, variables, images, masks=None, subsets=None, wanted=None, xp=jnp):
        p, (n, side) = variables["params"], images.shape[:2]
        self.seen.append((images.shape, masks is not None, subsets))
        patches = images.reshape(n, side // 2, 2, side // 2, 2).swapaxes(2, 3).reshape(n, -1, 4)
        x = xp.tanh(patches @ p["kernel"])
        if masks is not None:
            x = xp.where(masks[..., None], p["mask_token"], x)
        for subset in () if subsets is None else [s for branches in subsets for s in branches]:
            groups = len(subset)
            part = jax.nn.one_hot(subset, n // groups).sum(1).reshape(n, 1, 1)
            x = x * (1 + part)
        mean = x.mean(1)
        place = xp.linspace(0.5, 1.5, x.shape[1])[:, None]
        out = {"cls": mean, "patches": x * place + mean[:, None]}
        if wanted is not None:
            patches = out["patches"].reshape(len(wanted), -1, self.width)
            out["patches"] = xp.take_along_axis(patches, wanted[..., None], axis=1)
        return out


def _objective(separate: bool = False, dtype=jnp.float32, **fields) -> Objective:
    small = DINOHead(19, 10, 5, 2, dtype) if separate else None
    budget = masking.token_budget(4, PATCHES, 0.5, (0.1, 0.5))
    fields = dict(group_size=2, koleo_group=4, masked_budget=budget, drop_rates=(0.0,)) | fields
    return Objective(Patchwork(), DINOHead(23, 12, 5, 3, dtype), small, **fields)


def _params(objective: Objective, seed: int) -> dict:
    """Random values of about 0.5 wherever `init` has a parameter."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) * 0.5), shapes)


def _views(seed: int = 2) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"global": (IMAGES, 2, 8, 8, 1), "local": (IMAGES, LOCAL, 4, 4, 1)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _masks(seed: int = 0) -> np.ndarray:
    """As the pipeline draws them, but for the last group, in which nothing is masked."""
    drawn = [
        masking.group_masks(
            seed, 0, g, crops=4, image_size=8, patch_size=2, probability=0.5, ratio=(0.1, 0.5)
        ).reshape(2, 2, PATCHES)
        for g in range(IMAGES // 2)
    ]
    return np.concatenate([*drawn[:-1], np.zeros_like(drawn[-1])])


def _centres(objective: Objective) -> dict:
    rng = np.random.default_rng(9)
    zero = jax.eval_shape(objective.init_centres)
    return jax.tree.map(lambda c: np.float32(rng.normal(size=c.shape)), zero)


def _loss(objective, student, teacher, views, masks, key):
    temperature = jnp.float32(TEMPERATURE)
    return objective(student, teacher, _centres(objective), views, masks, key, temperature)


_value = jax.jit(_loss, static_argnums=0)
_gradient = jax.jit(jax.value_and_grad(_loss, argnums=(1, 2), has_aux=True), static_argnums=0)


def _run(how, objective: Objective, views=None, masks=None, seed: int = 0):
    """`_value`: (loss, (metrics, centres)); `_gradient`: that and the gradients (student, teacher)."""
    student, teacher = _params(objective, 0), _params(objective, 1)
    views, masks = _views() if views is None else views, _masks() if masks is None else masks
    return how(objective, student, teacher, views, masks, jax.random.key(seed))


# --- the formulas, in numpy float64 on the features of the backbone -----------------------------


def _literal_head(params: dict, x) -> np.ndarray:
    """MLP with exact GELU, unit sphere, weight-normalised prototypes: logits [..., K]."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    x = np.asarray(x, np.float64)
    layers = sorted(name for name in p if name.startswith("mlp"))
    for name in layers:
        x = x @ p[name]["kernel"] + p[name]["bias"]
        x = 0.5 * x * (1 + erf(x / np.sqrt(2))) if name != layers[-1] else x
    v = p["last_layer"]["weight_v"]
    rows = p["last_layer"]["weight_g"] * v / np.linalg.norm(v, axis=1, keepdims=True)
    return x / np.linalg.norm(x, axis=-1, keepdims=True) @ rows.T


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _sinkhorn(logits):
    q = np.exp(logits / TEMPERATURE).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True) * len(q)
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def _targets(logits, centre):
    """Teacher probabilities of logits [rows, K]: Sinkhorn where there is no centre."""
    if centre is None:
        return _sinkhorn(logits)
    return np.exp(_log_softmax((logits - centre) / TEMPERATURE))


def _koleo(x):
    """Pair by pair, in one group of one crop: [m, D]."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    dots = x @ x.T - 3 * np.eye(len(x))
    return -np.log(np.linalg.norm(x - x[dots.argmax(1)] + 1e-8, axis=1) + 1e-8).mean()


def _features(objective: Objective, params: dict, crops, masks=None):
    """Features of [B, crops, ...] in float64: class tokens and patches."""
    params, flat = jax.tree.map(np.float64, (params["backbone"], crops.reshape(-1, *crops.shape[2:])))
    masks = None if masks is None else masks.reshape(len(flat), -1)
    out = objective.backbone.apply({"params": params}, flat, masks, xp=np)
    return (out[name].reshape(*crops.shape[:2], *out[name].shape[1:]) for name in ("cls", "patches"))


def _literal(objective: Objective, views, masks) -> tuple[dict, dict]:
    """The four terms as the reference optimises them, and the mean logits that move the centres."""
    student, teacher, centres = _params(objective, 0), _params(objective, 1), _centres(objective)
    cls, patches = _features(objective, student, views["global"], masks)
    local, _ = _features(objective, student, views["local"])
    taught_cls, taught_patches = _features(objective, teacher, views["global"])
    images, crops = local.shape[:2]
    pairs = 2 + 2 * crops
    taught = _literal_head(teacher["dino_head"], taught_cls)
    flat = taught.reshape(2 * images, -1)
    target = _targets(flat, centres.get("dino")).reshape(taught.shape)

    def cross_entropy(logits, target):  # one view against one: mean over images
        return -(target * _log_softmax(logits / 0.1)).sum(-1).mean()

    ours, ours_local = (_literal_head(student["dino_head"], x) for x in (cls, local))
    found = {
        "dino_global": sum(cross_entropy(ours[:, i], target[:, 1 - i]) for i in (0, 1)) / pairs,
        "dino_local": sum(
            cross_entropy(ours_local[:, v], target[:, j]) for v in range(crops) for j in (0, 1)
        ) / pairs,
    }  # fmt: skip
    head = "ibot_head" if objective.ibot_head else "dino_head"
    where = np.asarray(masks)
    logits = _literal_head(teacher[head], taught_patches[where])
    target = _targets(logits, centres.get("ibot"))
    each = -(target * _log_softmax(_literal_head(student[head], patches[where]) / 0.1)).sum(-1)
    share = (1 / np.maximum(where.sum(-1, keepdims=True), 1) * np.ones_like(where))[where]
    found["ibot"] = (share * each).sum() / (2 * images)
    groups = cls.reshape(-1, objective.koleo_group, 2, cls.shape[-1])
    found["koleo"] = 0.1 * sum(np.mean([_koleo(g[:, i]) for g in groups]) for i in (0, 1))
    group = np.nonzero(where)[0] // objective.group_size
    means = [
        logits[group == g].mean(0) if (group == g).any() else 0 * logits[0]
        for g in range(images // objective.group_size)
    ]
    return found, {"dino": flat.mean(0), "ibot": np.mean(means, axis=0)}


@pytest.mark.parametrize("centring", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("separate", [False, True], ids=["one head", "two heads"])
def test_every_term_equals_its_formula(centring, separate):
    """float32 against float64: 2e-5 relative."""
    objective, views, masks = _objective(separate, centring=centring), _views(), _masks()
    total, (metrics, centres) = _run(_value, objective)
    expected, means = _literal(objective, views, masks)
    for name in TERMS:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(total, sum(expected.values()), rtol=2e-5)
    assert metrics["masked_tokens"] == masks.sum()
    before = _centres(objective)
    assert centres.keys() == before.keys() == ({"dino", "ibot"} if centring == "softmax" else set())
    for name, centre in centres.items():
        moved = 0.9 * before[name] + 0.1 * means[name]
        np.testing.assert_allclose(centre, moved, atol=1e-6, err_msg=name)


def test_centres_start_at_zero():
    centres = _objective(True, centring="softmax").init_centres()
    assert {name: centre.shape for name, centre in centres.items()} == {"dino": (23,), "ibot": (19,)}
    assert not any(centre.any() for centre in centres.values())


def test_a_weight_scales_its_terms_and_no_other():
    taught, crops = _pinned_taught(), _pinned_crops()
    before = _compare(_pinned(), taught, crops)
    after = _compare(_pinned(dino_weight=3.0, ibot_weight=5.0, koleo_weight=0.7), taught, crops)
    for name, factor in zip(TERMS, (3, 3, 5, 7), strict=True):
        np.testing.assert_allclose(after[name], factor * before[name], rtol=1e-5, err_msg=name)


# --- closed forms: features that are their own logits -------------------------------------------

D = 4  # width = bottleneck = prototypes; a head of one layer that changes nothing
EYE = np.eye(D, dtype=np.float32)
IDENTITY = {
    "mlp": {"kernel": EYE, "bias": np.zeros(D, np.float32)},
    "last_layer": {"weight_g": np.ones((D, 1), np.float32), "weight_v": EYE},
}
AGREE = np.log(np.exp(10) + D - 1) - 10  # cross-entropy of the right one-hot, logits 10 and 0
DIFFER = AGREE + 10


def _pinned(**fields) -> Objective:
    head = DINOHead(D, 1, D, 1)
    fields = dict(group_size=2, koleo_group=2, masked_budget=3, drop_rates=(0.0,)) | fields
    return Objective(Patchwork(), head, None, **fields)


def _pinned_taught(images: int = 4) -> dict:
    """Teacher: crop 0 of every image is class 0, crop 1 class 1; masked patches are class 2."""
    rows = np.broadcast_to(EYE[[0, 1]], (images, 2, D))
    constants = {"prototypes": EYE, "bias": np.zeros(D, np.float32), "temperature": np.float32(1e-3)}
    weight = np.float32([[0.5, 0.5, 1.0], [1.0, 0.0, 0.0]])  # the second group: one masked patch
    patches = np.broadcast_to(EYE[2], (2, 3, D))
    return {
        "weight": weight, "dino": constants | {"rows": rows}, "ibot": constants | {"rows": patches},
    }  # fmt: skip


def _pinned_crops(images: int = 4, first: int = 1, second: int = 0, local=(0, 3, 3)) -> dict:
    """Student: classes of the two global crops and of the local crops; patches agree."""
    return {
        "features": np.broadcast_to(EYE[[first, second]], (images, 2, D)),
        "local": np.broadcast_to(EYE[list(local)], (images, len(local), D)),
        "patches": np.broadcast_to(EYE[2], (2, 3, D)),
    }


@functools.partial(jax.jit, static_argnums=0)
def _jitted_compare(objective, taught, crops):
    return objective.compare({"dino_head": IDENTITY}, taught, crops)


def _compare(objective, taught, crops) -> dict:
    total, terms = _jitted_compare(objective, taught, crops)
    terms = {name: float(value) for name, value in terms.items()}
    assert sum(terms.values()) == pytest.approx(float(total), rel=1e-5)  # float32
    return terms


def test_a_global_crop_learns_from_the_other_global_crop():
    """Two pairs of 2 + 2 V = 8; a student that copies the teacher's own crop is wrong."""
    crossed = _compare(_pinned(), _pinned_taught(), _pinned_crops(first=1, second=0))
    copied = _compare(_pinned(), _pinned_taught(), _pinned_crops(first=0, second=1))
    np.testing.assert_allclose(crossed["dino_global"], 2 * AGREE / 8, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(copied["dino_global"], 2 * DIFFER / 8, rtol=1e-5)


def test_a_local_crop_learns_from_both_global_crops_and_counts_among_all_pairs():
    """V = 3 locals: one agrees with one of two teachers, two with none; 2 + 2 V = 8 pairs."""
    found = _compare(_pinned(), _pinned_taught(), _pinned_crops())["dino_local"]
    np.testing.assert_allclose(found, (AGREE + 5 * DIFFER) / 8, rtol=1e-5)


def test_ibot_is_divided_by_all_global_crops_though_few_are_masked():
    """4 images, 8 global crops, 3 of them with masked patches, of weights that sum to 1 each."""
    crops = _pinned_crops()
    crops["patches"] = np.broadcast_to(EYE[0], (2, 3, D))
    found = _compare(_pinned(), _pinned_taught(), crops)["ibot"]
    np.testing.assert_allclose(found, 3 * DIFFER / 8, rtol=1e-5)


def test_koleo_is_summed_over_the_crops_and_averaged_over_groups():
    """Neighbours in another group or in the other crop, however near, are not looked at."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 2, D)).astype(np.float32)
    features[2:, 0] = features[:2, 0]  # a copy in the other group of two
    features[:, 1] = features[:, 0] + 1e-3  # and in the other crop
    crops = _pinned_crops() | {"features": features}
    found = _compare(_pinned(), _pinned_taught(), crops)["koleo"]
    expected = [_koleo(features[i : i + 2, crop].astype(float)) for crop in (0, 1) for i in (0, 2)]
    np.testing.assert_allclose(found, 0.1 * 2 * np.mean(expected), rtol=1e-5)
    whole = _compare(_pinned(koleo_group=4), _pinned_taught(), crops)["koleo"]
    assert whole > found + 1  # the copies lie in one group now


def test_without_local_crops_three_pairs_are_counted_as_in_the_reference():
    crops = _pinned_crops()
    del crops["local"]
    found = _compare(_pinned(), _pinned_taught(), crops)
    np.testing.assert_allclose(found["dino_global"], 2 * AGREE / 3, rtol=1e-5, atol=1e-6)
    assert found["dino_local"] == 0


# --- the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_head_ends_on_the_unit_sphere_with_cosine_logits(layers):
    head = DINOHead(23, 12, 5, layers)
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 7)))["params"]
    rng = np.random.default_rng(layers)
    params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), shapes)
    x = rng.normal(size=(6, 7)).astype(np.float32)
    rows, weights = jax.jit(lambda p: (head.apply({"params": p}, x), prototypes(p)))(params)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, rtol=1e-5)  # float32
    np.testing.assert_allclose(rows @ weights.T, _literal_head(params, x), rtol=1e-4, atol=1e-5)


def test_a_padded_token_has_a_finite_gradient_through_a_head_whose_biases_are_zero_still():
    """A row of zeros then stays zero: the gradient of its norm must not be NaN."""
    head = DINOHead(23, 12, 5, 2)
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 7)))["params"]
    params = trees.unflatten({
        name: np.full(x.shape, 0.0 if name.endswith("bias") else 0.3, np.float32)
        for name, x in trees.flatten(shapes).items()
    })  # fmt: skip
    run = jax.jit(jax.value_and_grad(lambda x: head.apply({"params": params}, x).sum()))
    rows, grad = run(np.zeros((2, 7), np.float32))
    assert rows == 0 and np.isfinite(grad).all()


# --- masked tokens ------------------------------------------------------------------------------


def test_masked_tokens_come_in_order_with_their_crops_weight_and_padding_of_weight_zero():
    masks = _masks()
    budget = int(masks.reshape(4, -1).sum(1).max()) + 3
    index, weight = jax.jit(masked_tokens, static_argnums=(1, 2))(masks, 2, budget)
    assert index.shape == weight.shape == (4, budget) and weight.dtype == jnp.float32
    for g, group in enumerate(masks.reshape(4, 4, PATCHES)):
        flat = [(crop, patch) for crop in range(4) for patch in range(PATCHES) if group[crop, patch]]
        padding = budget - len(flat)
        expected = [crop * PATCHES + patch for crop, patch in flat] + [0] * padding
        np.testing.assert_array_equal(index[g], expected)
        shares = [1 / group[crop].sum() for crop, _ in flat] + [0] * padding
        np.testing.assert_allclose(weight[g], shares, rtol=1e-6)  # float32


def test_a_group_without_masks_or_with_all_of_them_fits():
    masks = np.zeros((4, 2, PATCHES), bool)
    masks[2:] = True
    index, weight = jax.jit(masked_tokens, static_argnums=(1, 2))(masks, 2, 4 * PATCHES)
    np.testing.assert_array_equal(weight[0], 0)
    np.testing.assert_array_equal(index[1], np.arange(4 * PATCHES))
    np.testing.assert_allclose(weight[1], 1 / PATCHES, rtol=1e-6)


# --- what must not change the loss, and what must -----------------------------------------------


def test_the_gradient_is_that_of_the_value_and_the_teacher_gets_none():
    """Central differences along random directions, one per module: 1 % in float32."""
    objective = _objective(separate=True)
    student, teacher = _params(objective, 0), _params(objective, 1)
    args = (teacher, _views(), _masks(), jax.random.key(0))
    _, (grad, of_teacher) = _gradient(objective, student, *args)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    for module, direction in _params(objective, 5).items():
        pairs = zip(*map(jax.tree.leaves, (grad[module], direction)), strict=True)
        slope = sum(np.vdot(g, d) for g, d in pairs)
        ends = []
        for step in (3e-3, -3e-3):
            moved = jax.tree.map(lambda p, d, s=step: p + s * d, student[module], direction)
            ends.append(_value(objective, student | {module: moved}, *args)[0])
        np.testing.assert_allclose((ends[0] - ends[1]) / 6e-3, slope, rtol=0.01, err_msg=module)


def test_shards_and_chunks_change_neither_loss_nor_gradient():
    """The same sums in another order: 1e-6 relative for the loss, 1e-5 of the largest gradient."""
    (total, _), (grad, _) = _run(_gradient, _objective(separate=True))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grad))
    changed = _objective(separate=True, shards=2, logits_budget=3 * 23)
    (other, _), (found, _) = _run(_gradient, changed)
    np.testing.assert_allclose(other, total, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grad), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_the_order_of_groups_changes_nothing():
    """Whole KoLeo groups of 4 for every term; strata groups of 2 for all but KoLeo."""
    views, masks = _views(), _masks()
    _, (before, _) = _run(_value, _objective())
    for order, same in [([4, 5, 6, 7, 0, 1, 2, 3], TERMS), ([2, 3, 6, 7, 0, 1, 4, 5], TERMS[:3])]:
        turned = {name: x[order] for name, x in views.items()}
        _, (after, _) = _run(_value, _objective(), turned, masks[order])
        for name in same:  # float32
            np.testing.assert_allclose(after[name], before[name], rtol=1e-5, err_msg=name)
    assert after["koleo"] != before["koleo"]


def test_gradients_are_finite_where_one_patch_of_the_whole_batch_is_masked():
    masks = np.zeros_like(_masks())
    masks[3, 1, 5] = True
    (total, (metrics, _)), (grad, _) = _run(_gradient, _objective(separate=True), masks=masks)
    assert np.isfinite(total) and metrics["masked_tokens"] == 1
    for name, leaf in trees.flatten(grad).items():
        assert np.isfinite(leaf).all(), name


@pytest.mark.parametrize("off", [dict(masked_budget=0), dict(ibot_weight=0.0)])
def test_without_masked_images_the_other_terms_are_as_they_were(off):
    """No budget for masked tokens, or no weight for their term: the ablation without it."""
    masks = np.zeros_like(_masks()) if "masked_budget" in off else _masks()
    _, (expected, _) = _run(_value, _objective(), masks=masks)
    total, (metrics, _) = _run(_value, _objective(**off), masks=masks)
    assert metrics["ibot"] == 0
    for name in ("dino_global", "dino_local", "koleo"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(total, sum(metrics[name] for name in TERMS), rtol=1e-6)


def test_stochastic_depth_drops_crops_of_the_student_alone_by_group():
    """Half of 2 x 2 global and of 2 x 2 local crops of each of 4 groups, drawn anew for each key."""
    objective = _objective(drop_rates=(0.5,))
    calls = objective.backbone.seen
    calls.clear()
    losses = [_run(_value, objective, seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert abs(losses[2] - losses[0]) > 1e-4 * losses[0]
    teacher, student, local = calls
    assert teacher == ((2 * IMAGES, 8, 8, 1), False, None)
    assert (student[:2], local[:2]) == (((16, 8, 8, 1), True), ((16, 4, 4, 1), False))
    for _, _, subsets in (student, local):
        assert [branch.shape for branch in subsets[0]] == [(4, 2), (4, 2)]


def test_bfloat16_heads_are_close_to_float32_and_leave_the_loss_in_float32():
    _, (terms, _) = _run(_value, _objective())
    found, (rounded, _) = _run(_value, _objective(dtype=jnp.bfloat16))
    assert found.dtype == jnp.float32
    for name in TERMS:  # bf16 has eight bits, and temperatures multiply by 10 and 20
        np.testing.assert_allclose(rounded[name], terms[name], rtol=0.05, err_msg=name)


@pytest.mark.slow
def test_bfloat16_heads_give_float32_gradients_close_to_the_exact_ones():
    _, exact = _run(_gradient, _objective(separate=True))
    _, found = _run(_gradient, _objective(separate=True, dtype=jnp.bfloat16))
    for name, grad in trees.flatten(found[0]).items():
        expected = trees.flatten(exact[0])[name]
        assert grad.dtype == jnp.float32, name
        error = np.linalg.norm(grad - expected) / np.linalg.norm(expected)
        assert error < 0.1, (name, error)  # eight bits, and temperatures multiply by 10 and 20
