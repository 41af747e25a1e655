"""The vision transformer: sizes, a literal forward pass in float64, remat, backends, drop path.

Letters: n crops, T tokens, D width, H heads, d = D / H, M side of the stored position grid.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from raddino_jax import params as trees
from raddino_jax import sharding
from raddino_jax.models import attention, vit

# --- sizes --------------------------------------------------------------------------------------

PARAMETERS = {  # patches of 14 px, a position grid of 37 x 37; S, B, L and g as released
    "Ti": 5_719_872,
    "S": 22_056_576,
    "B": 86_580_480,
    "L": 304_368_640,
    "g": 1_136_480_768,
}


def _count(variant: str, **fields) -> int:
    model = vit.ViT(**vit.VARIANTS[variant], **fields)
    crop = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    return trees.count(jax.eval_shape(model.init, jax.random.key(0), crop)["params"])


@pytest.mark.parametrize("variant", PARAMETERS)
def test_a_size_has_its_number_of_parameters(variant):
    assert _count(variant) == PARAMETERS[variant]


def test_no_size_is_missing_from_the_table():
    assert set(PARAMETERS) == set(vit.VARIANTS)


def test_registers_and_layerscale_are_counted_too():
    assert _count("B", registers=4) == 86_583_552
    assert _count("B", layerscale=0.0) == PARAMETERS["B"] - 12 * 2 * 768


# --- a tiny model with random weights, and the same forward pass by hand ------------------------

TINY = dict(width=16, depth=2, heads=2, patch_size=4, image_size=16)
KINDS = {
    "mlp": dict(),
    "swiglu and registers": dict(ffn="swiglu", registers=3),
    "no layerscale": dict(layerscale=0.0),
}


def _params(model: vit.ViT, seed: int = 0) -> dict:
    """Random weights that leave nothing at zero or one.

    The residual stream is about 0.003, so that the variance under a norm is near its eps, 1e-6;
    the kernels are large enough for attention and GELU to be far from linear.
    """
    crop = jnp.zeros((1, model.image_size, model.image_size, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), crop)["params"]
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        x = rng.normal(size=shape)
        if name.startswith("patch_embed") or name.endswith(("token", "tokens", "pos_embed")):
            return 0.003 * x
        if name.endswith("kernel"):
            x *= 1.5 / shape[0] ** 0.5
            narrow = "proj" in name or "fc2" in name or "w3" in name
            return x * (0.003 if narrow and not model.layerscale else 1)
        if name.endswith("gamma"):
            return 0.003 * x
        return x / 10 + (1 if name.endswith("scale") else 0) if "norm" in name else x / 300

    flat = {name: draw(name, leaf.shape) for name, leaf in trees.flatten(shapes).items()}
    return trees.unflatten({name: np.float32(value) for name, value in flat.items()})


def _images(n: int = 3, size: int = 16, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, size, size, 1)).astype(np.float32)


def _masks(n: int = 3, patches: int = 16, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).random((n, patches)) < 0.4


def _literal(model: vit.ViT, params: dict, images, masks=None, subsets=None) -> dict:
    """The forward pass at the stored size in float64, one crop after another."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    out = {}

    def normed(x, q):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-6) * q["scale"] + q["bias"]

    def dense(x, q):
        return x @ q["kernel"] + q["bias"]

    def attend(x, q):  # one crop [T, D]
        d = x.shape[-1] // model.heads
        queries, keys, values = np.split(dense(x, q["qkv"]), 3, axis=-1)
        heads = []
        for h in range(model.heads):
            part = slice(h * d, (h + 1) * d)
            scores = np.exp(queries[:, part] @ keys[:, part].T / np.sqrt(d))
            heads.append(scores / scores.sum(-1, keepdims=True) @ values[:, part])
        return dense(np.concatenate(heads, axis=-1), q["proj"])

    def feed(x, q):
        if model.ffn == "mlp":
            hidden = dense(x, q["fc1"])
            return dense(0.5 * hidden * (1 + erf(hidden / np.sqrt(2))), q["fc2"])
        gate, value = np.split(dense(x, q["w12"]), 2, axis=-1)
        return dense(gate / (1 + np.exp(-gate)) * value, q["w3"])

    def add(xs, branch, subset):  # subset [groups, m] of each group's crops, None: all
        if subset is None:
            return [x + branch(x) for x in xs]
        size = len(xs) // len(subset)
        xs = list(xs)
        for g, chosen in enumerate(np.asarray(subset)):
            for j in chosen:
                xs[g * size + j] = xs[g * size + j] + branch(xs[g * size + j]) * size / len(chosen)
        return xs

    side, s = model.image_size // model.patch_size, model.patch_size
    kernel, crops = p["patch_embed"]["kernel"], []
    for i, image in enumerate(np.asarray(images, np.float64)):
        rows = []
        for r, c in itertools.product(range(side), repeat=2):
            patch = np.broadcast_to(image[r * s : (r + 1) * s, c * s : (c + 1) * s], (s, s, 3))
            token = np.einsum("pqc,pqcd->d", patch, kernel) + p["patch_embed"]["bias"]
            masked = masks is not None and masks[i, r * side + c]
            rows.append(p["mask_token"][0] if masked else token)
        tokens = np.stack([p["cls_token"][0, 0], *rows]) + p["pos_embed"][0]
        registers = p["register_tokens"][0] if model.registers else tokens[:0]
        crops.append(np.concatenate([tokens[:1], registers, tokens[1:]]))
    out["embedded"] = crops
    for i in range(model.depth):
        q = p[f"blocks_{i}"]
        g1, g2 = (q[f"ls{j}"]["gamma"] if model.layerscale else 1.0 for j in (1, 2))
        first, second = (None, None) if subsets is None else subsets[i]
        crops = add(crops, lambda x, q=q, g=g1: g * attend(normed(x, q["norm1"]), q["attn"]), first)
        out[f"blocks_{i}/attn"] = crops
        crops = add(crops, lambda x, q=q, g=g2: g * feed(normed(x, q["norm2"]), q["mlp"]), second)
        out[f"blocks_{i}"] = crops
    final, first = normed(np.stack(crops), p["norm"]), 1 + model.registers
    out |= {"prenorm": crops, "cls": final[:, 0], "registers": final[:, 1:first]}
    return {name: np.stack(x) for name, x in out.items()} | {"patches": final[:, first:]}


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: vit.ViT, params: dict, *args) -> dict:
    return model.apply({"params": params}, *args)


@pytest.mark.parametrize(
    "kind, masked",
    [("mlp", False), ("mlp", True), ("swiglu and registers", True), ("no layerscale", True)],
)
def test_every_named_intermediate_equals_the_forward_pass_by_hand(kind, masked):
    """float32 against float64: the stream is about 0.003, what leaves the last norm about 1."""
    model = vit.ViT(**TINY | KINDS[kind])
    params, images, masks = _params(model), _images(), _masks() if masked else None
    found, expected = _apply(model, params, images, masks), _literal(model, params, images, masks)
    assert set(found) == set(expected)
    for name, value in expected.items():
        normed = name in ("cls", "patches", "registers")
        np.testing.assert_allclose(found[name], value, atol=2e-5 if normed else 1e-7, err_msg=name)


def test_one_channel_equals_three_equal_channels():
    model = vit.ViT(**TINY)
    params, images = _params(model), _images()
    one, three = (_apply(model, params, x) for x in (images, np.repeat(images, 3, axis=-1)))
    for name in ("embedded", "cls", "patches"):  # float32
        np.testing.assert_allclose(one[name], three[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_crops_do_not_see_each_other():
    model = vit.ViT(**TINY)
    params, images = _params(model), _images()
    before = _apply(model, params, images)["patches"]
    images[[0, 2]] += 1
    after = _apply(model, params, images)["patches"]
    np.testing.assert_allclose(before[1], after[1], atol=1e-5)  # float32
    assert np.abs(before[0] - after[0]).max() > 0.1


@pytest.mark.parametrize("shape", [(1, 18, 16, 1), (1, 16, 15, 1)])
def test_a_side_that_the_patch_does_not_divide_is_refused_with_both_numbers(shape):
    model = vit.ViT(**TINY)
    with pytest.raises(ValueError, match=rf"{shape[1]} x {shape[2]} .* patch size 4"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_fresh_weights_are_distributed_as_in_the_reference():
    """Plain normals of 0.02 (its truncation is at 100 sigma), tokens of 1e-6, uniform patches."""
    model = vit.ViT(96, 1, 2, patch_size=4, image_size=96, registers=40)
    key = jax.random.key(0, impl="rbg")  # compiles faster
    flat = trees.flatten(jax.jit(model.init)(key, jnp.zeros((1, 96, 96, 1)))["params"])
    normals = {name: 0.02 for name in flat if name.endswith("kernel") or name == "pos_embed"}
    del normals["patch_embed/kernel"]
    for name, sd in (normals | {"cls_token": 1e-6, "register_tokens": 1e-6}).items():
        few = name == "cls_token"
        np.testing.assert_allclose(np.std(flat[name]), sd, rtol=0.3 if few else 0.03, err_msg=name)
    assert np.abs(flat["pos_embed"]).max() > 3.5 * 0.02  # 55,000 draws reach 4 sigma
    bound = (3 * 4 * 4) ** -0.5
    for name in ("kernel", "bias"):
        values = np.abs(flat[f"patch_embed/{name}"])
        assert 0.95 * bound < values.max() <= bound
        np.testing.assert_allclose(values.mean(), bound / 2, rtol=0.15)
    for name, value in flat.items():
        if name == "mask_token" or (name.endswith("bias") and "patch_embed" not in name):
            np.testing.assert_array_equal(value, 0)
        if name.endswith(("gamma", "scale")):
            np.testing.assert_array_equal(value, np.float32(1e-5 if "gamma" in name else 1))


# --- remat --------------------------------------------------------------------------------------


def _objective(remat: str):
    model = vit.ViT(**TINY | {"depth": 1}, remat=remat)
    params, images = _params(model), jnp.asarray(_images())
    return params, lambda p: jnp.sin(3 * model.apply({"params": p}, images)["patches"]).sum()


@functools.cache
def _value_and_grad(remat: str):
    params, f = _objective(remat)
    value, grad = jax.jit(jax.value_and_grad(f))(params)
    return value, trees.flatten(grad)


@pytest.mark.parametrize("remat", [name for name in vit.REMAT if name != "none"])
def test_a_remat_policy_changes_neither_value_nor_gradient(remat):
    (value, grad), (value2, grad2) = _value_and_grad("none"), _value_and_grad(remat)
    np.testing.assert_allclose(value, value2, rtol=1e-5)  # float32, like the rest
    assert grad.keys() == grad2.keys()
    for name, expected in grad.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grad2[name], expected, atol=1e-4 * scale, err_msg=name)


def test_a_stricter_remat_policy_keeps_less_for_the_backward_pass():
    def kept(remat):
        params, f = _objective(remat)
        saved = jax.eval_shape(lambda p: jax.vjp(f, p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(saved))

    sizes = [kept(remat) for remat in ("none", "dots", "full")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3, sizes


# --- attention ----------------------------------------------------------------------------------


def _qkv(dtype=jnp.float32, shape=(2, 7, 3, 4)):
    rng = np.random.default_rng(3)
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for _ in range(3)]


def _attention_by_hand(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.exp(np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1]))
    return np.einsum("nhqk,nkhd->nqhd", scores / scores.sum(-1, keepdims=True), v)


@functools.cache
def _value_and_pullback(backend: str):
    q, k, v = _qkv()

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *qkv: attention.attention(*qkv, backend), q, k, v)
        return out, pull(jnp.sin(out))

    return run(q, k, v)


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_a_backend_equals_attention_by_hand_and_its_gradient_that_of_the_others(backend):
    found, grads = _value_and_pullback(backend)
    np.testing.assert_allclose(found, _attention_by_hand(*_qkv()), atol=1e-5)  # float32
    for ours, plain in zip(grads, _value_and_pullback("xla")[1], strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_long_sequences_on_a_cpu_go_by_blocks_of_queries_and_lose_nothing(monkeypatch):
    expected, expected_grads = _value_and_pullback("xla")
    monkeypatch.setattr(attention, "LONG", 4)
    monkeypatch.setattr(attention, "QUERIES", 3)  # 7 tokens: blocks of 3, the last one padded
    found, grads = _value_and_pullback("cpu")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected_grads)


def test_the_tpu_kernel_on_a_padded_sequence_equals_plain_attention():
    """In pallas' interpreter: values and gradients, 150 tokens in two tiles of 128."""
    q, k, v = _qkv(shape=(1, 150, 2, 64))

    def both(how):
        return jax.value_and_grad(lambda *x: jnp.sin(how(*x)).sum(), argnums=(0, 1, 2))(q, k, v)

    found = both(lambda *x: attention._splash(*x, interpret=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, both(attention._xla))


@pytest.mark.parametrize("crops, on_each", [(8, 1), (3, 3)])
def test_the_tpu_kernel_runs_on_a_devices_crops_or_on_all_that_cannot_be_shared_out(monkeypatch, crops, on_each):
    seen = []

    def kernel(q, k, v):
        seen.append(len(q))
        return attention._xla(q, k, v)

    monkeypatch.setattr(attention, "_splash", kernel)
    q, k, v = _qkv(jnp.bfloat16, shape=(crops, attention.LONG, 1, 4))
    with jax.set_mesh(sharding.make_mesh(jax.devices())):
        found = jax.jit(attention._tpu)(q, k, v)
    assert seen == [on_each]
    found, expected = (np.asarray(x, np.float32) for x in (found, attention._xla(q, k, v)))
    np.testing.assert_allclose(found, expected, atol=0.01)  # bf16, of about 1


def test_the_tpu_kernel_is_not_asked_for_float32(monkeypatch):
    """Compiled for a v5e its tiles of float32 need 19.6 MiB of 16."""
    monkeypatch.setattr(attention, "_splash", None)
    q, k, v = _qkv(shape=(1, attention.LONG, 1, 4))
    np.testing.assert_array_equal(attention.attention(q, k, v, "tpu"), attention._xla(q, k, v))


@pytest.mark.parametrize("backend", ["xla", "cpu"])  # "gpu" needs cuDNN in half precision
def test_half_precision_attention_keeps_its_dtype_and_is_close(backend):
    q, k, v = _qkv(jnp.bfloat16)
    found = jax.jit(attention.attention, static_argnums=3)(q, k, v, backend)
    assert found.dtype == jnp.bfloat16
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found, _attention_by_hand(q, k, v), atol=0.05)  # bf16, of about 4


def test_attention_weights_are_probabilities_that_give_the_output():
    q, k, v = _qkv()
    weights = jax.jit(attention.weights)(q, k)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    found = np.einsum("nhqk,nkhd->nqhd", weights, v)
    np.testing.assert_allclose(found, _attention_by_hand(q, k, v), atol=1e-5)


# --- position embeddings ------------------------------------------------------------------------


@pytest.mark.parametrize("offset, antialias", [(0.1, False), (0.0, False), (0.0, True)])
@pytest.mark.parametrize("stored, grid", [(37, (14, 14)), (37, (16, 9)), (5, (8, 7)), (6, (5, 6))])
def test_position_embeddings_are_resized_as_torch_does(stored, grid, offset, antialias):
    """float32: torch's own rounding on a table of unit variance is about 7e-6."""
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(4).normal(size=(stored, stored)).astype(np.float32)
    scale = tuple((n + offset) / stored for n in grid)
    size = dict(scale_factor=scale) if offset else dict(size=grid)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table)[None, None], mode="bicubic", antialias=antialias, **size
    )[0, 0].numpy()
    assert expected.shape == grid
    rows, columns = (vit.resize_weights(stored, n, offset, antialias) for n in grid)
    np.testing.assert_allclose(rows @ table @ columns.T, expected, atol=3e-5)


def test_a_table_is_resized_down_its_rows_and_across_its_columns_and_cls_stays():
    pos = np.random.default_rng(5).normal(size=(1, 1 + 16, 3)).astype(np.float32)
    found = jax.jit(vit.resize_pos_embed, static_argnums=(1, 2, 3))(pos, (2, 3), 0.1, False)
    rows, columns = (vit.resize_weights(4, n, 0.1, False) for n in (2, 3))
    expected = np.einsum("hm,mkd,wk->hwd", rows, pos[0, 1:].reshape(4, 4, 3), columns)
    np.testing.assert_array_equal(found[0, 0], pos[0, 0])
    np.testing.assert_allclose(found[0, 1:], expected.reshape(6, 3), atol=1e-6)  # float32


def test_a_crop_of_another_size_gets_the_table_as_the_hub_models_resize_it():
    model = vit.ViT(**TINY)
    params = _params(model)
    params["patch_embed"] = jax.tree.map(np.zeros_like, params["patch_embed"])
    embed = jax.jit(lambda params, images: model.apply({"params": params}, images)["embedded"])
    found = embed(params, _images(size=12))
    rows = vit.resize_weights(4, 3, 0.1, False)
    table = params["pos_embed"][0, 1:].reshape(4, 4, -1)
    expected = np.einsum("hm,mkd,wk->hwd", rows, table, rows).reshape(9, -1)
    np.testing.assert_allclose(found[0, 1:], expected, atol=1e-8)  # float32, of 0.003


def test_at_the_stored_size_the_table_is_untouched_and_elsewhere_all_of_it_is_trained():
    pos = jnp.asarray(np.random.default_rng(5).normal(size=(1, 50, 3)), jnp.float32)
    assert vit.resize_pos_embed(pos, (7, 7), 0.1, False) is pos

    @jax.jit
    @jax.grad
    def gradient(pos):
        return (vit.resize_pos_embed(pos, (4, 4), 0.1, False) ** 2).sum()

    assert (np.abs(gradient(pos)) > 0).all()


# --- stochastic depth ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "crops, rate, kept", [(20, 0.3, 14), (7, 0.3, 4), (10, 0.8, 1), (2, 0.9, 1), (1, 0.5, 1)]
)
def test_a_subset_has_as_many_crops_as_the_reference_keeps(crops, rate, kept):
    """crops * (1 - rate) in floating point, truncated: 10 * (1 - 0.8) is a little below 2."""
    drawn = jax.eval_shape(lambda key: vit.draw_subsets(key, jnp.arange(3), crops, [rate]), jax.random.key(0))
    assert [branch.shape for branch in drawn[0]] == [(3, kept)] * 2


def test_no_rate_means_no_subset_for_a_block_and_for_all():
    assert vit.draw_subsets(jax.random.key(0), jnp.arange(2), 8, [0.0, 0.0]) is None
    drawn = jax.eval_shape(lambda key: vit.draw_subsets(key, jnp.arange(2), 8, [0.0, 0.5]), jax.random.key(0))
    assert drawn[0] == (None, None) and drawn[1][0].shape == (2, 4)


@functools.partial(jax.jit, static_argnums=1)
def _draw(key, groups):
    return vit.draw_subsets(key, jnp.arange(groups), 8, [0.5, 0.25, 0.5])


def test_a_group_draws_the_same_subsets_however_many_groups_there_are():
    few, many = (_draw(jax.random.key(1), groups) for groups in (3, 1000))
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b[:3])


def test_a_subset_has_no_crop_twice_and_every_crop_equally_often():
    drawn = jax.tree.leaves(_draw(jax.random.key(2), 1000))
    for branch, kept in zip(drawn, [4, 4, 6, 6, 4, 4], strict=True):
        assert all(len(set(row)) == kept for row in branch.tolist())
        share = np.bincount(np.asarray(branch).ravel(), minlength=8) / 1000
        np.testing.assert_allclose(share, kept / 8, atol=0.08)  # sd 0.016


def test_groups_blocks_branches_and_keys_draw_independently():
    """Two independent subsets of 4 of 8 crops share 2 on average."""
    (first, branch), _, (block, _) = jax.tree.map(np.asarray, _draw(jax.random.key(1), 1000))
    (key, _), _, _ = jax.tree.map(np.asarray, _draw(jax.random.key(2), 1000))
    pairs = {"group": (first[:-1], first[1:])} | {
        what: (first, other) for what, other in [("branch", branch), ("block", block), ("key", key)]
    }
    for what, (a, b) in pairs.items():
        shared = (a[:, :, None] == b[:, None, :]).sum((1, 2)).mean()
        np.testing.assert_allclose(shared, 2, atol=0.15, err_msg=what)  # sd 0.024


def test_the_mean_over_all_subsets_is_the_residual_without_drop_path():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(5, 2, 3)), jnp.float32)
    everyone = np.array(list(itertools.combinations(range(5), 3)))[:, None]
    dropped = jax.jit(jax.vmap(lambda subset: vit.residual(x, jnp.exp, subset)))(everyone)
    np.testing.assert_allclose(dropped.mean(0), x + jnp.exp(x), rtol=1e-5)  # float32


def test_a_model_with_subsets_runs_each_branch_on_its_crops_alone():
    model = vit.ViT(**TINY)
    params, images = _params(model), _images(6)
    subsets = [
        (np.array([[2, 0], [1, 2]]), np.array([[1], [0]])),
        (None, np.array([[0, 1], [2, 1]])),
    ]
    found = _apply(model, params, images, None, subsets)
    for name, value in _literal(model, params, images, None, subsets).items():
        if name.startswith("blocks"):
            np.testing.assert_allclose(found[name], value, atol=1e-7, err_msg=name)
    np.testing.assert_array_equal(found["blocks_0/attn"][1], found["embedded"][1])
    assert not np.array_equal(found["blocks_0/attn"][0], found["embedded"][0])


# --- wanted patches -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "swiglu and registers", "no layerscale"])
@pytest.mark.parametrize("dropped", [False, True])
def test_wanted_patches_are_those_of_the_whole_and_so_are_gradients(kind, dropped):
    """Float32; two groups of three crops, one patch twice, some of crops that drop path leaves out as well."""
    model = vit.ViT(**TINY | KINDS[kind])
    params, images, masks = _params(model), _images(6), _masks(6)
    wanted = np.array([[0, 5, 16, 47, 5], [31, 32, 33, 2, 0]])  # of 3 x 16
    subsets = [(None, None), (np.array([[2, 0], [1, 2]]), np.array([[1, 0], [0, 2]]))] if dropped else None
    rng = np.random.default_rng(8)
    uneven = {"cls": rng.normal(size=(6, model.width)), "patches": rng.normal(size=(2, 5, model.width))}

    def total(params, asked):
        out = model.apply({"params": params}, images, masks, subsets, wanted if asked else None)
        if not asked:
            patches = out["patches"].reshape(2, 48, -1)
            out["patches"] = jnp.take_along_axis(patches, wanted[..., None], axis=1)
        found = {name: out[name] for name in uneven}
        return sum((np.float32(uneven[name]) * found[name]).sum() for name in uneven), found

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    ((_, found), grads), ((_, expected), known) = run(params, True), run(params, False)
    for name in uneven:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)  # about 1
    for name, value in trees.flatten(known).items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(trees.flatten(grads)[name], value, atol=1e-5 * scale + 1e-7, err_msg=name)


def test_the_last_feed_forward_runs_on_class_tokens_and_wanted_patches_alone():
    model = vit.ViT(**TINY)
    params, images = _params(model), _images()
    run = jax.jit(lambda params, wanted: model.apply({"params": params}, images, None, None, wanted))
    work = [run.lower(params, asked).cost_analysis()["flops"] for asked in (None, np.array([[40]]))]
    products = (3 * 17 - 4) * 2 * 8 * model.width**2  # of the tokens that are not
    assert work[0] - work[1] > products


# --- half precision -----------------------------------------------------------------------------


def test_bfloat16_is_close_to_float64_and_keeps_its_parameters_in_float32():
    model = vit.ViT(**TINY, dtype=jnp.bfloat16)
    params, images, masks = _params(model), _images(), _masks()
    fresh = jax.eval_shape(model.init, jax.random.key(0), images[:1])["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    found = _apply(model, params, images, masks)
    for name, expected in _literal(model, params, images, masks).items():
        assert found[name].dtype == jnp.bfloat16, name
        error = np.abs(np.asarray(found[name], np.float64) - expected)
        if expected.size:  # eight bits: 4 % of the largest value at worst, 0.4 % on average
            assert error.max() < 0.04 * np.abs(expected).max(), name
            assert error.mean() < 0.004 * np.abs(expected).max(), name
