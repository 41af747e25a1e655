"""Every array of the reference code, compared at its stated tolerance, in float32.

The arrays come from facebookresearch/dinov2 (README.md beside them says how); RADDINO_GOLDENS names the folder. Files
are found by prefix, records by key pattern and every size is read from the file, so that another folder of the same
form tests the same things.
"""

import json
import os
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict

from configs import common, multicxr
from raddino_jax import augment, encoders, losses, masking, optim, train
from raddino_jax import params as trees
from raddino_jax.augment import ViewSettings
from raddino_jax.conversion import formats, rules, sources, tables
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.models import vit
from raddino_jax.models.heads import DINOHead, prototypes
from raddino_jax.models.ops import LayerNorm
from raddino_jax.objective import masked_tokens

GOLDENS = Path(os.environ["RADDINO_GOLDENS"])


@pytest.fixture(autouse=True)
def as_users_compile(request):
    """Whole steps and networks with all optimisations, which other tests go without (conftest.py)."""
    before = jax.config.read("jax_disable_most_optimizations")
    if "train_" in request.node.name or "hub" in request.node.name:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def records(prefix: str, pattern: str = "", exclude: str = "$^"):
    """One case (file, *groups of the pattern) per distinct match among the keys of every file of a kind."""
    found = []
    for path in sorted(GOLDENS.glob(f"{prefix}*.npz")):
        if re.search(exclude, path.name):
            continue
        keys = np.load(path).files if pattern else [""]
        hits = dict.fromkeys(m.groups() for m in (re.match(pattern, key) for key in keys) if m)
        found += [pytest.param(path, *groups, id="-".join([path.stem, *groups])) for groups in hits]
    width = 1 + re.compile(pattern).groups
    lacking = pytest.mark.skip(f"no {prefix} file with {pattern!r} in {GOLDENS}")
    return found or [pytest.param(*[None] * width, marks=lacking)]


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)


def under(golden: dict, prefix: str) -> dict[str, np.ndarray]:
    return {key[len(prefix):]: value for key, value in golden.items() if key.startswith(prefix)}


def backbone_params(foreign: dict, what) -> dict:
    return trees.unflatten(rules.read(tables.DINOV2, rules.unchunk(foreign), str(what)))


def head_params(foreign: dict, what) -> dict:
    return trees.unflatten(rules.read(tables.DINO_HEAD, foreign, str(what)))


def module_params(foreign: dict, what) -> dict:
    """"backbone.…", "dino_head.…", "ibot_head.…" -> our tree."""
    modules = {name.partition(".")[0] for name in foreign}
    readers = {"backbone": backbone_params, "dino_head": head_params, "ibot_head": head_params}
    return {m: readers[m](under(foreign, m + "."), what) for m in sorted(modules)}


def pixels(u8: np.ndarray, divisor: float) -> np.ndarray:
    """The goldens' input: NCHW bytes -> NHWC floats."""
    return ((u8.astype(np.float32) - 128) / divisor).transpose(0, 2, 3, 1)


# --- the vision transformer ------------------------------------------------------------------------------

VIT_TOLERANCE = dict(rtol=1e-4, atol=5e-5)


def golden_vit(golden: dict, backend: str = "xla") -> vit.ViT:
    cfg = {key: value.item() for key, value in under(golden, "cfg/").items()}
    return vit.ViT(
        cfg["embed_dim"], cfg["depth"], cfg["num_heads"], "swiglu" if cfg["ffn_swiglu"] else "mlp",
        image_size=cfg["img_size"], registers=cfg["num_register_tokens"],
        layerscale=float(any(".ls1." in key for key in golden)),
        antialias=cfg["interpolate_antialias"], offset=cfg["interpolate_offset"], attention=backend,
    )


def vit_out(golden: dict, images: np.ndarray, masks=None, **kwargs) -> dict:
    params = backbone_params(under(golden, "param/"), "golden")
    return jax.jit(golden_vit(golden, **kwargs).apply)({"params": params}, images, masks)


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("path, size", records("vit_", r"in/(\d+x\d+)/u8"))
def test_vit_forward(path, size, backend):
    golden = load(path)
    out = vit_out(golden, pixels(golden[f"in/{size}/u8"], 48), backend=backend)
    names = {"x_norm_clstoken": "cls", "x_norm_regtokens": "registers"}
    names |= {"x_norm_patchtokens": "patches", "x_prenorm": "prenorm"}
    compared = [theirs for theirs in names if f"out/{size}/{theirs}" in golden]
    assert compared
    for theirs in compared:
        np.testing.assert_allclose(out[names[theirs]], golden[f"out/{size}/{theirs}"], **VIT_TOLERANCE, err_msg=theirs)


@pytest.mark.parametrize("path, size", records("vit_", r"in/(\d+x\d+)/masks"))
def test_vit_masked(path, size):
    golden = load(path)
    out = vit_out(golden, pixels(golden[f"in/{size}/u8"], 48), golden[f"in/{size}/masks"])
    for theirs, ours in [("x_norm_clstoken", "cls"), ("x_norm_patchtokens", "patches")]:
        np.testing.assert_allclose(out[ours], golden[f"out/{size}/masked/{theirs}"], **VIT_TOLERANCE)


@pytest.mark.parametrize(
    "path, size, block, what", records("vit_", r"out/(\d+x\d+)/inter_norm/block(\d+)/(patch_BDHW|cls)")
)
def test_vit_intermediates(path, size, block, what):
    golden = load(path)
    images = pixels(golden[f"in/{size}/u8"], 48)
    model, params = golden_vit(golden), backbone_params(under(golden, "param/"), path)
    tokens = vit_out(golden, images)[f"blocks_{block}"]
    tokens = LayerNorm(jnp.float32).apply({"params": params["norm"]}, tokens)
    ours = vit.split(tokens, model.registers)
    expected = golden[f"out/{size}/inter_norm/block{block}/{what}"]
    patches = np.asarray(ours["patches"]).transpose(0, 2, 1)
    found = ours["cls"] if what == "cls" else patches.reshape(expected.shape)
    np.testing.assert_allclose(found, expected, **VIT_TOLERANCE)


@pytest.mark.parametrize("path, size", records("vit_", r"out/(\d+x\d+)/inter_nonorm_last/patch_BND"))
def test_vit_last_block_without_norm(path, size):
    golden = load(path)
    model = golden_vit(golden)
    out = vit_out(golden, pixels(golden[f"in/{size}/u8"], 48))
    found = vit.split(out[f"blocks_{model.depth - 1}"], model.registers)["patches"]
    np.testing.assert_allclose(found, golden[f"out/{size}/inter_nonorm_last/patch_BND"], **VIT_TOLERANCE)


@pytest.mark.parametrize("path, crop", records("vit_", r"out/nested/(\d+)/x_norm_clstoken"))
def test_vit_crops_together(path, crop):
    """The reference packs crops of two sizes into one call; the first (masked) and second size follow file order."""
    golden = load(path)
    sizes = [key.split("/")[1] for key in golden if re.fullmatch(r"in/\d+x\d+/u8", key)]
    size, expected = sizes[int(crop)], golden[f"out/nested/{crop}/x_norm_clstoken"]
    images, masks = pixels(golden[f"in/{size}/u8"], 48), golden.get(f"in/{size}/masks")
    candidates = [vit_out(golden, images, m)["cls"] for m in ([masks, None] if masks is not None else [None])]
    errors = [np.abs(np.asarray(found) - expected).max() for found in candidates]
    np.testing.assert_allclose(candidates[int(np.argmin(errors))], expected, **VIT_TOLERANCE)


@pytest.mark.parametrize(
    "path, stored, way, grid", records("posembed_interp", r"out/(\d+)/(off[\d.]+_(?:no)?aa)/(\d+x\d+)")
)
def test_position_embedding(path, stored, way, grid):
    golden = load(path)
    offset, antialias = re.match(r"off([\d.]+)_(no)?aa", way).groups()
    rows, columns = map(int, grid.split("x"))
    pos = jnp.asarray(golden[f"in/pos_embed_{stored}"])
    found = vit.resize_pos_embed(pos, (rows, columns), float(offset), antialias is None)
    np.testing.assert_allclose(found, golden[f"out/{stored}/{way}/{grid}"], atol=2e-5, rtol=0)


# --- stochastic depth ---------------------------------------------------------------------------------------


def golden_block(golden: dict):
    params = {f"blocks.0.{name}": value for name, value in under(golden, "param/").items()}
    params = backbone_params(params, "golden")["blocks_0"]
    width = golden["in/x0"].shape[-1]
    return vit.Block(width, golden["cfg/num_heads"].item(), "mlp", 1.0, "xla", jnp.float32), params


def nested(golden: dict):
    block, params = golden_block(golden)
    inputs = [golden[key] for key in sorted(golden) if re.fullmatch(r"in/x\d+", key)]
    perms = [golden[f"perm/nested_call{i}"] for i in range(2 * len(inputs))]
    kept = [max(int(len(x) * (1 - golden["cfg/ratio"].item())), 1) for x in inputs]

    def outputs(params, xs):
        return [
            block.apply({"params": params}, x, perms[i][None, : kept[i]], perms[len(xs) + i][None, : kept[i]])[1]
            for i, x in enumerate(xs)
        ]

    return outputs, params, [jnp.asarray(x) for x in inputs]


@pytest.mark.parametrize("path, index", records("block_droppath", r"out/nested(\d+)$"))
def test_drop_path_outputs(path, index):
    golden = load(path)
    outputs, params, inputs = nested(golden)
    np.testing.assert_allclose(outputs(params, inputs)[int(index)], golden[f"out/nested{index}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", records("block_droppath"))
def test_drop_path_gradients(path):
    golden = load(path)
    outputs, params, inputs = nested(golden)

    @jax.jit
    def loss(params, xs):
        return sum((out.ravel() * jnp.linspace(-1, 1, out.size)).sum() for out in outputs(params, xs))

    of_params, of_inputs = jax.grad(loss, argnums=(0, 1))(params, inputs)
    for i, grad in enumerate(of_inputs):
        np.testing.assert_allclose(grad, golden[f"out/grad_x{i}"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_params["ls1"]["gamma"], golden["out/grad_ls1_gamma"], rtol=1e-4, atol=1e-4)
    qkv = of_params["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(qkv.T, golden["out/grad_qkv_weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path, index", records("block_droppath", r"out/single(\d+)$"))
def test_drop_path_single(path, index):
    golden = load(path)
    block, params = golden_block(golden)
    x = golden[f"in/x{index}"]
    kept = max(int(len(x) * (1 - golden["cfg/ratio"].item())), 1)
    subsets = [golden[f"perm/single_call{branch}"][None, :kept] for branch in range(2)]
    found = block.apply({"params": params}, jnp.asarray(x), *subsets)[1]
    np.testing.assert_allclose(found, golden[f"out/single{index}"], rtol=1e-4, atol=1e-4)


# --- heads ------------------------------------------------------------------------------------------------


def golden_head(golden: dict):
    cfg = {key: value.item() for key, value in under(golden, "cfg/").items()}
    layers, bottleneck = cfg["nlayers"], cfg["bottleneck_dim"]
    head = DINOHead(cfg["out_dim"], cfg.get("hidden_dim", 0), bottleneck, layers)
    return head, head_params(under(golden, "param/"), "golden")


def head_logits(head, params, x):
    rows = head.apply({"params": params}, x)
    return rows @ prototypes(params).T


@pytest.mark.parametrize("path, name", records("dino_head", r"(head\d+)/"))
def test_head(path, name):
    golden = under(load(path), name + "/")
    head, params = golden_head(golden)
    x, cotangent = jnp.asarray(golden["in/x"]), golden["in/cotangent"]
    np.testing.assert_allclose(head_logits(head, params, x), golden["out/y"], rtol=1e-4, atol=1e-5)

    def loss(params, x):  # row 0 is padding, left out of the gradients
        return (head_logits(head, params, x) * cotangent)[1:].sum()

    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert np.isfinite(of_x).all()
    np.testing.assert_allclose(of_x[1:], golden["grad/x_rows1plus"], rtol=1e-4, atol=1e-5)
    expected = under(golden, "grad/")
    expected.pop("x_rows1plus")
    expected = trees.flatten(head_params(expected, path))
    for key, grad in trees.flatten(of_params).items():
        np.testing.assert_allclose(grad, expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("path, name", records("dino_head", r"(head\d+)/init/"))
def test_head_initialisation(path, name):
    golden = under(load(path), name + "/")
    head, _ = golden_head(golden)
    layer = head.init(jax.random.key(0), jnp.zeros((1, golden["in/x"].shape[-1])))["params"]["last_layer"]
    bound = head.bottleneck**-0.5
    assert golden["init/weight_v_absmax"] <= bound and np.abs(layer["weight_v"]).max() <= bound
    assert np.abs(layer["weight_v"]).max() > 0.9 * bound
    np.testing.assert_array_equal(np.unique(layer["weight_g"]), golden["init/weight_g_unique"])


# --- losses -------------------------------------------------------------------------------------------------

LOSS_TOLERANCE = dict(rtol=1e-4, atol=1e-6)
SINKHORN_TOLERANCE = dict(rtol=1e-3, atol=1e-7)


def identity(logits: np.ndarray) -> jax.Array:
    """Prototypes that turn given logits into themselves: the goldens of the losses start from logits."""
    return jnp.eye(logits.shape[-1])


def sinkhorn(logits: np.ndarray, temperature: float) -> np.ndarray:
    rows, eye = jnp.asarray(logits), identity(logits)
    bias = losses.sinkhorn_bias(rows[None], jnp.ones((1, len(rows))), eye, temperature)
    return losses.targets(rows, eye, temperature, bias)


@pytest.mark.parametrize("path, call", records("losses", r"dino/sk/call(\d+)/out", "distributed"))
def test_dino_sinkhorn(path, call):
    golden = under(load(path), f"dino/sk/call{call}/")
    found = sinkhorn(golden["teacher_logits"], golden["temp"])
    np.testing.assert_allclose(found, golden["out"], **SINKHORN_TOLERANCE)


@pytest.mark.parametrize("path", records("losses", "", "distributed"))
def test_ibot_sinkhorn(path):
    golden = under(load(path), "ibot/")
    found = sinkhorn(golden["teacher_logits"], golden["temp"])
    np.testing.assert_allclose(found, golden["sk_out"], **SINKHORN_TOLERANCE)


def inferred_temperature(logits: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature that a file does not state.

    log target = logit / temperature - (one number per row) - (one per prototype): least squares over the targets
    that are far from underflow.
    """
    k = logits.shape[-1]
    x, y = logits.reshape(-1, k).astype(np.float64), probabilities.reshape(-1, k)
    row, column = np.nonzero(y > 1e-25)
    design = np.zeros((len(row), 1 + len(x) + k))
    each = np.arange(len(row))
    design[:, 0], design[each, 1 + row], design[each, 1 + len(x) + column] = x[row, column], 1, 1
    slope = np.linalg.lstsq(design, np.log(y[row, column].astype(np.float64)), rcond=None)[0][0]
    return round(1 / slope, 4)


@pytest.mark.parametrize("path, kind", records("losses", r"(dino|ibot)/center/call0/out", "distributed"))
def test_softmax_centring(path, kind):
    """Consecutive calls: the centre of call n is what calls before it left, and the last one is final_center."""
    golden = under(load(path), f"{kind}/center/")
    calls = sorted({int(key.split("/")[0][4:]) for key in golden if key.startswith("call")})
    centre = jnp.zeros(golden["final_center"].shape[-1])
    for call in calls:
        logits = golden[f"call{call}/teacher_logits"].reshape(-1, centre.size)
        temperature = golden.get(f"call{call}/temp")
        if temperature is None:
            temperature = inferred_temperature(logits, golden[f"call{call}/out"])
        if f"call{call}/center_used" in golden:
            np.testing.assert_allclose(centre, golden[f"call{call}/center_used"][0], **LOSS_TOLERANCE)
        bias = losses.centre_bias(centre, temperature)
        found = losses.targets(jnp.asarray(logits), identity(logits), temperature, bias)
        np.testing.assert_allclose(found, golden[f"call{call}/out"].reshape(logits.shape), **LOSS_TOLERANCE)
        rows, valid = jnp.asarray(logits)[None], jnp.ones((1, len(logits)))
        centre = losses.update_centre(centre, rows, valid, identity(logits), 0.9)
    np.testing.assert_allclose(centre, golden["final_center"].ravel(), **LOSS_TOLERANCE)


def pair_loss(student, targets, weight, budget=2**26):
    """`losses.cross_entropy` from student logits [n, S, K], target probabilities [n, T, K] and weights [n]."""
    teacher = {
        "rows": jnp.log(jnp.maximum(targets, 1e-37))[None], "weight": jnp.asarray(weight)[None],
        "prototypes": identity(targets), "bias": jnp.zeros(targets.shape[-1]), "temperature": 1.0,
    }
    return losses.cross_entropies((jnp.asarray(student)[None],), identity(targets), (teacher,), 0.1, budget)[0]


@pytest.mark.parametrize("budget", [2**26, 1])
@pytest.mark.parametrize("path", records("losses", "", "distributed"))
def test_dino_cross_entropy(path, budget):
    golden = under(load(path), "dino/fwd/")
    targets = golden["teacher_2BK"]
    images, k = targets.shape[1:]
    local = golden["student_local"].reshape(-1, images, k).transpose(1, 0, 2)  # crop-major -> image-major
    mean = np.full(images, 1 / images, np.float32)
    both = targets.transpose(1, 0, 2)
    value, grad = jax.value_and_grad(pair_loss)(local, both, mean, budget)
    np.testing.assert_allclose(value, golden["loss_local_raw"], **LOSS_TOLERANCE)
    np.testing.assert_allclose(grad.transpose(1, 0, 2).reshape(-1, k), golden["grad_local_raw"], **LOSS_TOLERANCE)
    student, flat = golden["student_global"][:, None], targets.reshape(-1, 1, k)
    value, grad = jax.value_and_grad(pair_loss)(student, flat, np.full(2 * images, 0.5 / images, np.float32), budget)
    np.testing.assert_allclose(value, golden["loss_global_raw"], **LOSS_TOLERANCE)
    np.testing.assert_allclose(2 * grad[:, 0], golden["grad_global_2x_raw"], **LOSS_TOLERANCE)
    crops = 2 + 2 * local.shape[1]
    np.testing.assert_allclose(2 * value / crops, golden["loss_global_scaled"], **LOSS_TOLERANCE)


@pytest.mark.parametrize("budget", [2**26, 1])
@pytest.mark.parametrize("path", records("losses", "", "distributed"))
def test_ibot_cross_entropy(path, budget):
    golden = under(load(path), "ibot/")
    masks = golden["masks"]
    weight = golden["masks_weight"] / len(masks)
    student, targets = golden["student_logits"][:, None], golden["sk_out"][:, None]
    value, grad = jax.value_and_grad(pair_loss)(student, targets, weight, budget)
    np.testing.assert_allclose(value, golden["loss"], **LOSS_TOLERANCE)
    np.testing.assert_allclose(grad[:, 0], golden["grad_student"], **LOSS_TOLERANCE)
    dense = [golden[f"dense/{side}"][masks][:, None] for side in ("student", "teacher")]
    np.testing.assert_allclose(pair_loss(*dense, weight, budget), golden["dense/loss"], **LOSS_TOLERANCE)


@pytest.mark.parametrize("path", records("losses", "", "distributed"))
def test_masked_token_weights(path):
    golden = under(load(path), "ibot/")
    masks = golden["masks"].reshape(-1, 2, golden["masks"].shape[-1])
    masked = int(masks.sum())
    index, weight = masked_tokens(jnp.asarray(masks), len(masks), masked + 5)
    np.testing.assert_array_equal(index[0, :masked], np.flatnonzero(masks))
    np.testing.assert_allclose(weight[0], np.pad(golden["masks_weight"], (0, 5)), rtol=1e-7)


@pytest.mark.parametrize("path", records("losses", "", "distributed"))
def test_koleo(path):
    golden = under(load(path), "koleo/")
    value, grad = jax.value_and_grad(lambda x: losses.koleo(x[None]))(jnp.asarray(golden["x"]))
    np.testing.assert_allclose(value, golden["loss"], **LOSS_TOLERANCE)
    np.testing.assert_allclose(grad, golden["grad"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses.koleo(jnp.asarray(golden["dup_x"])[None]), golden["dup_loss"], rtol=1e-4)
    np.testing.assert_allclose(losses.koleo(jnp.asarray(golden["x"])[None, :1]), golden["b1_loss"], rtol=1e-4)


def ranks(golden: dict, kind: str, what: str) -> list[np.ndarray]:
    names = sorted({key.split("/")[0] for key in golden if key.startswith("rank")})
    return [golden[f"{rank}/{kind}/{what}"] for rank in names]


@pytest.mark.parametrize("path, kind", records("losses_distributed", r"rank0/(dino|ibot)/sk_out"))
def test_distributed_sinkhorn(path, kind):
    """Ranks are shards of unequal length, padded."""
    golden = load(path)
    logits = ranks(golden, kind, "teacher_logits")
    n = max(map(len, logits))
    rows = jnp.stack([np.pad(x, [(0, n - len(x)), (0, 0)]) for x in logits])
    valid = jnp.stack([np.arange(n) < len(x) for x in logits]).astype(jnp.float32)
    expected_rows = ranks(golden, kind, "sk_out")
    temperature = inferred_temperature(np.concatenate(logits), np.concatenate(expected_rows))
    for budget in (2**26, 1):
        eye = identity(rows)
        bias = losses.sinkhorn_bias(rows, valid, eye, temperature, budget=budget)
        for x, expected in zip(logits, expected_rows, strict=True):
            found = losses.targets(jnp.asarray(x), eye, temperature, bias)
            np.testing.assert_allclose(found, expected, **SINKHORN_TOLERANCE)


@pytest.mark.parametrize("path, kind", records("losses_distributed", r"rank0/(dino|ibot)/center_after"))
def test_distributed_centre(path, kind):
    golden = load(path)
    logits = ranks(golden, kind, "teacher_logits")
    n = max(map(len, logits))
    rows = jnp.stack([np.pad(x, [(0, n - len(x)), (0, 0)]) for x in logits])
    valid = jnp.stack([np.arange(n) < len(x) for x in logits]).astype(jnp.float32)
    found = losses.update_centre(jnp.zeros(rows.shape[-1]), rows, valid, identity(rows), 0.9)
    for expected in ranks(golden, kind, "center_after"):
        np.testing.assert_allclose(found, expected.ravel(), rtol=0, atol=1e-6)


# --- the training step ----------------------------------------------------------------------------------------


def golden_config(golden: dict) -> ConfigDict:
    """Our config of a golden's yaml, read by the same table that reads the released recipes."""
    config = multicxr.get_config()
    arch = yaml.safe_load(str(golden["cfg/arch"]))
    common.recipe(config, str(golden["cfg/yaml"]))
    config.model.update(width=arch["embed_dim"], depth=arch["depth"], heads=arch["num_heads"])
    images = len(golden["in/global_u8"]) // 2
    config.update(compute_dtype="float32", batch_size=config.koleo_group, group_size=images, koleo_group=images)
    return config


def golden_step(golden: dict) -> train.Step:
    config = golden_config(golden)  # its batch_size is the yaml's: the learning rate comes from it
    objective = train.objective_of(config)
    assert objective.masked_budget == golden["in/upperbound"]
    schedules = train.schedules_of(config, train.run_steps(config, 0), 0)
    return train.Step(objective, train.optimizer_of(config), schedules, ViewSettings(), 0.0, 1.0, 0)


def golden_batch(golden: dict) -> tuple[dict, jax.Array]:
    """Crop-major arrays of the reference -> views and masks with the images outermost."""

    def image_major(x, crops):
        return np.moveaxis(x.reshape(crops, -1, *x.shape[1:]), 0, 1)

    local = pixels(golden["in/local_u8"], 64)
    images = len(golden["in/global_u8"]) // 2
    views = {
        "global": image_major(pixels(golden["in/global_u8"], 64), 2),
        "local": image_major(local, len(local) // images),
    }
    return jax.tree.map(jnp.asarray, views), jnp.asarray(image_major(golden["in/masks"], 2))


def golden_state(golden: dict, step: train.Step, index: int) -> train.TrainState:
    student, teacher = (
        jax.tree.map(jnp.asarray, module_params(under(golden, f"{side}_init/"), side))
        for side in ("student", "teacher")
    )
    return train.TrainState(
        jnp.asarray(index, jnp.int32), student, teacher, step.optimizer.init(student), step.objective.init_centres()
    )


TERMS = {  # ours -> (the reference's log, what it logs of the optimised amount)
    "loss": ("total_loss_backprop", 1.0),
    "dino_local": ("dino_local_crops_loss", 1.0),
    "dino_global": ("dino_global_crops_loss", 1.0),
    "koleo": ("koleo_loss", 0.5),
    "ibot": ("ibot_loss", 0.5),
}
SCHEDULED = {"lr": "lr", "weight_decay": "wd", "momentum": "mom"}
SCHEDULED |= {"teacher_temp": "teacher_temp", "last_layer_lr": "last_layer_lr"}


jitted_update = jax.jit(train.update, static_argnums=4)


def one_step(path):
    golden = load(path)
    step = golden_step(golden)
    index = golden["cfg/it0"].item()
    state = golden_state(golden, step, index)
    views, masks = golden_batch(golden)
    return golden, step, state, views, masks, index


@pytest.mark.parametrize("path", records("train_step_"))
def test_train_step_losses_and_norms(path):
    golden, step, state, views, masks, _ = one_step(path)
    _, metrics = jitted_update(state, views, masks, jax.random.key(0), step)
    for ours, (theirs, share) in TERMS.items():
        np.testing.assert_allclose(share * metrics[ours], golden[f"rec/{theirs}"], rtol=2e-5, err_msg=ours)
    for key in (key for key in golden if key.startswith("rec/gradnorm_")):
        found = metrics["grad_norm_" + key.removeprefix("rec/gradnorm_")]
        np.testing.assert_allclose(found, golden[key], rtol=2e-3, err_msg=key)


@pytest.mark.parametrize("path", records("train_step_"))
def test_train_step_targets(path):
    """What the teacher teaches, in the reference's order: [crop 1 of all images, crop 0 of all images]."""
    golden, step, state, views, masks, index = one_step(path)
    objective = step.objective
    where, weight = masked_tokens(masks, objective.group_size, objective.masked_budget)
    temperature = step.schedules.at(index)["teacher_temp"]
    seen = jax.jit(objective.look)(state.teacher, {"views": views, "index": where})
    taught, _ = jax.jit(objective.centre)(seen, weight, state.teacher, state.centres, temperature)
    n = golden["in/n_masked"].item()

    def swapped(x):
        return np.asarray(x)[:, ::-1].swapaxes(0, 1).reshape(-1, x.shape[-1])

    logits = {
        "dino": swapped(taught["dino"]["rows"] @ taught["dino"]["prototypes"].T),
        "ibot": order(golden, np.asarray(taught["ibot"]["rows"][0, :n] @ taught["ibot"]["prototypes"].T), where, n),
    }
    for kind, key in [("dino", "teacher_dino_logits_swapped"), ("ibot", "teacher_ibot_logits")]:
        np.testing.assert_allclose(logits[kind], golden[f"mid/{key}"], rtol=1e-4, atol=2e-5)
    for kind, key in [("dino", "teacher_dino_probs_swapped"), ("ibot", "teacher_ibot_probs")]:
        if f"mid/{key}" in golden:
            found = jax.nn.softmax(logits[kind] / temperature - taught[kind]["bias"], axis=-1)
            np.testing.assert_allclose(found, golden[f"mid/{key}"], rtol=1e-3, atol=1e-6)


def order(golden, rows, where, n):
    """Our masked tokens (image-major) in the reference's order (crop-major)."""
    patches = golden["in/masks"].shape[-1]
    crop, patch = np.divmod(np.asarray(where[0, :n]), patches)
    image, view = np.divmod(crop, 2)
    images = len(golden["in/masks"]) // 2
    theirs = (view * images + image) * patches + patch
    sorted_ours = np.argsort(theirs)
    np.testing.assert_array_equal(theirs[sorted_ours], golden["in/mask_indices"])
    return rows[sorted_ours]


@pytest.mark.parametrize("path", records("train_step_"))
def test_train_step_student_features(path):
    golden, step, state, views, masks, _ = one_step(path)
    objective = step.objective
    where, _ = masked_tokens(masks, objective.group_size, objective.masked_budget)
    given = {"views": views, "masks": masks, "index": where, "groups": jnp.arange(len(where))}
    crops = jax.jit(objective.study)(state.student, given, jax.random.key(0))
    n = golden["in/n_masked"].item()
    crop_major = lambda x: np.asarray(x).swapaxes(0, 1).reshape(-1, x.shape[-1])  # noqa: E731
    found = {
        "student_global_cls": crop_major(crops["features"]),
        "student_local_cls": crop_major(crops["local"]),
        "student_masked_patch_tokens": order(golden, np.asarray(crops["patches"][0, :n]), where, n),
    }
    head = state.student["dino_head"]
    for where_from, key in [("features", "student_global_dino_logits"), ("local", "student_local_dino_logits")]:
        found[key] = crop_major(head_logits(objective.dino_head, head, crops[where_from]))
    for key, value in found.items():
        np.testing.assert_allclose(value, golden[f"mid/{key}"], rtol=1e-4, atol=5e-5, err_msg=key)


@pytest.mark.parametrize("path", records("train_step_"))
def test_train_step_gradients(path):
    golden, step, state, views, masks, index = one_step(path)
    temperature = step.schedules.at(index)["teacher_temp"]

    def loss(student):
        return step.objective(student, state.teacher, state.centres, views, masks, jax.random.key(0), temperature)[0]

    found = trees.flatten(jax.jit(jax.grad(loss))(state.student))
    expected = trees.flatten(module_params(under(golden, "grad_raw/"), path))
    assert found.keys() == expected.keys()
    largest = max(np.abs(g).max() for g in expected.values())
    for name, grad in expected.items():
        np.testing.assert_allclose(found[name], grad, rtol=2e-3, atol=2e-6 * largest, err_msg=name)


def sure_of(golden, path, share: float) -> dict[str, np.ndarray]:
    """Where a gradient exceeds a share of the largest: Adam's first step is a sign, and rounding decides the rest."""
    grads = trees.flatten(module_params(under(golden, "grad_raw/"), path))
    largest = max(np.abs(g).max() for g in grads.values())
    return {name: np.abs(g) >= share * largest for name, g in grads.items()}


def assert_after(golden, path, params, side, atol, sure):
    expected = trees.flatten(module_params(under(golden, f"{side}_after/"), path))
    for name, value in trees.flatten(params).items():
        found, wanted = np.asarray(value)[sure[name]], expected[name][sure[name]]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol, err_msg=f"{side} {name}")


@pytest.mark.parametrize("path", records("train_step_"))
def test_update_from_reference_gradients(path):
    """Clip, AdamW, groups and EMA alone: the reference's own gradients go in."""
    golden, step, state, _, _, index = one_step(path)
    grads = jax.tree.map(jnp.asarray, module_params(under(golden, "grad_raw/"), path))
    schedule = step.schedules.at(index)
    student, _, _ = jax.jit(step.optimizer.update)(state.student, grads, state.opt, schedule)
    sure = sure_of(golden, path, 1e-7)
    assert_after(golden, path, student, "student", 2e-5, sure)
    assert_after(golden, path, optim.ema(state.teacher, student, schedule["momentum"]), "teacher", 2e-6, sure)


@pytest.mark.parametrize("path", records("train_step_"))
def test_train_step_parameters(path):
    """The whole step; elements whose gradient lies below the gradients' own tolerance are no evidence."""
    golden, step, state, views, masks, _ = one_step(path)
    after, _ = jitted_update(state, views, masks, jax.random.key(0), step)
    sure = sure_of(golden, path, 2e-6)
    assert_after(golden, path, after.student, "student", 2e-5, sure)
    assert_after(golden, path, after.teacher, "teacher", 2e-6, sure)


@pytest.mark.parametrize("path", records("train_step_"))
def test_train_step_schedule_and_groups(path):
    golden, step, state, _, _, index = one_step(path)
    for ours, theirs in SCHEDULED.items():
        np.testing.assert_allclose(step.schedules.at(index)[ours], golden[f"rec/{theirs}"], rtol=1e-7, err_msg=ours)
    rows = zip(*(golden[f"groups/{k}"] for k in ("names", "lr_mult", "wd_mult", "is_last_layer")), strict=True)
    names, o = trees.flatten(state.student), step.optimizer
    lr = optim.lr_factors(names, step.objective.backbone.depth, o.layer_decay, o.patch_embed_factor)
    decay = optim.decay_factors(names)
    seen = set()
    for theirs, lr_mult, wd_mult, last in rows:
        ours = our_name(theirs.removeprefix("student."))
        seen.add(ours)
        np.testing.assert_allclose([lr[ours], decay[ours]], [lr_mult, wd_mult], rtol=1e-12, err_msg=theirs)
        assert optim.is_last_layer(ours) == last
    assert seen == set(names)


def our_name(theirs: str) -> str:
    """Our name of a reference parameter "module.name"."""
    module, _, name = theirs.partition(".")
    table = tables.DINOV2 if module == "backbone" else tables.DINO_HEAD
    foreign = rules.unchunk({name: np.zeros((1, 1, 1, 1) if "patch_embed.proj.weight" in name else (1, 1))})
    return f"{module}/{next(iter(rules.read(table, foreign, theirs)))}"


@pytest.mark.parametrize("path", records("train_run_"))
def test_train_run(path):
    """Consecutive steps from iteration 0: warm-up from learning rate 0, a frozen last layer, moving centres."""
    start = path.with_name(path.name.replace("train_run_", "train_step_"))
    if not start.exists():
        pytest.skip(f"{path.name} starts from {start.name}, which is not there")
    golden = load(path)
    first = load(start) | under(golden, "step0/")
    step = golden_step(first)
    state = golden_state(first, step, 0)
    steps = len(golden["rec/lr"])
    for i in range(steps):
        for kind, key in [("dino", "dino_center_in_use"), ("ibot", "ibot_center_in_use")]:
            if f"step{i}/{key}" in golden:
                np.testing.assert_allclose(state.centres[kind], golden[f"step{i}/{key}"].ravel(), rtol=2e-4, atol=1e-6)
        for ours, theirs in SCHEDULED.items():
            np.testing.assert_allclose(step.schedules.at(i)[ours], golden[f"rec/{theirs}"][i], rtol=2e-4)
        views, masks = golden_batch(under(golden, f"step{i}/"))
        state, metrics = jitted_update(state, views, masks, jax.random.key(i), step)
        for ours, (theirs, share) in TERMS.items():
            found, expected = share * metrics[ours], golden[f"rec/{theirs}"][i]
            np.testing.assert_allclose(found, expected, rtol=2e-4, err_msg=f"{ours}, step {i}")
        for key in (key for key in golden if key.startswith("rec/gradnorm_")):
            found = metrics["grad_norm_" + key.removeprefix("rec/gradnorm_")]
            np.testing.assert_allclose(found, golden[key][i], rtol=2e-4, err_msg=f"{key}, step {i}")
    for side, params in [("student", state.student), ("teacher", state.teacher)]:
        flat = trees.flatten(params)
        for name, length in under(golden, f"final_{side}_l2/").items():
            found = np.linalg.norm(np.asarray(flat[our_name(name)], np.float64))
            np.testing.assert_allclose(found, length, rtol=5e-4, atol=1e-7, err_msg=f"{side} {name}")


# --- schedules and parameter groups -----------------------------------------------------------------------------


@pytest.mark.parametrize("path, name", records("schedules", r"(\w+)/cfg_yaml"))
def test_schedules(path, name):
    golden = under(load(path), name + "/")
    config = multicxr.get_config()
    common.recipe(config, str(golden["cfg_yaml"]))
    config.batch_size = config.koleo_group * golden["world_size"].item()
    schedules = train.schedules_of(config, train.run_steps(config, 0), 0)
    np.testing.assert_allclose(schedules.lr[0], golden["peak_lr_after_scaling"], rtol=1e-12)
    assert schedules.total == golden["lr_table_len"]
    index = np.arange(len(golden["lr"]))
    values = schedules.at(index)
    traced = jax.jit(schedules.at)(jnp.asarray(index))
    for ours, theirs in {**SCHEDULED, "weight_decay": "wd", "momentum": "momentum"}.items():
        expected = golden[theirs][: len(index)]
        np.testing.assert_allclose(values[ours], expected, rtol=1e-7, err_msg=ours)
        np.testing.assert_allclose(traced[ours], expected, rtol=2e-4, atol=1e-9, err_msg=f"{ours} inside jit")


@pytest.mark.parametrize("path, name", records("param_groups", r"(\w+)/names"))
def test_parameter_groups(path, name):
    golden = under(load(path), name + "/")
    module = "backbone" if "layerwise_decay" in golden else "dino_head"
    names = [our_name(f"{module}.{theirs}") for theirs in golden["names"]]
    assert len(set(names)) == len(names)
    depth = 1 + max([int(n) for n in re.findall(r"blocks_(\d+)/", " ".join(names))], default=0)
    layer_decay, patch = golden.get("layerwise_decay", np.float64(1)), golden.get("patch_embed_lr_mult", np.float64(1))
    lr = optim.lr_factors(names, depth, layer_decay.item(), patch.item())
    decay = optim.decay_factors(names)
    np.testing.assert_allclose([lr[n] for n in names], golden["lr_mult"], rtol=1e-12)
    np.testing.assert_allclose([decay[n] for n in names], golden["wd_mult"], rtol=0)
    assert [optim.is_last_layer(n) for n in names] == list(golden["is_last_layer"])
    assert_same_parameters(golden, module, names, depth)


def assert_same_parameters(golden, module, names, depth):
    """The network of that size, traced without memory, has these parameters and no other."""
    shapes = [tuple(map(int, re.findall(r"\d+", shape))) for shape in golden["shapes"]]
    by_name = dict(zip(golden["names"], shapes, strict=True))
    if module == "backbone":
        width, side = by_name["cls_token"][-1], round((by_name["pos_embed"][1] - 1) ** 0.5)
        registers = by_name.get("register_tokens", (0, 0))[1]
        model = vit.ViT(width, depth, width // 64, image_size=side * 14, registers=registers)
        args = (jnp.zeros((1, side * 14, side * 14, 1)),)
    else:
        k, bottleneck = by_name["last_layer.weight_v"]
        hidden, width = by_name["mlp.0.weight"]
        model, args = DINOHead(k, hidden, bottleneck), (jnp.zeros((1, width)),)
    tree = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    assert {f"{module}/{name}" for name in trees.flatten(tree)} == set(names)
    assert trees.count(tree) == golden["n_params"]


MORE = 4  # times the reference's draws, so that most of the scatter of a difference is its own


def _cases(kind: str, pattern: str) -> list:
    """One case (file, match) per distinct match of `pattern` with the keys of the kind's files."""
    cases, folder = [], GOLDENS
    for path in sorted(folder.glob(f"{kind}*.npz")):
        with np.load(path) as arrays:
            matches = [re.match(pattern, key) for key in arrays.files]
        found = {match.group(): match for match in matches if match}
        cases += [pytest.param(path.name, m, id=f"{path.stem}/{k}") for k, m in found.items()]
    skip = pytest.mark.skip(reason=f"no record of {kind} in {folder}")
    return cases or [pytest.param("", None, marks=skip, id=f"no_{kind}")]


def _record(path: Path, prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix`, by the rest of their names."""
    with np.load(path) as arrays:
        return {k[len(prefix) :]: arrays[k] for k in arrays.files if k.startswith(prefix)}


def _assert_equal_means(ours, theirs, std, n_ours: int, n_theirs: int, name: str):
    """Means of two samples: not further apart than four standard errors of their difference."""
    limit = 4 * np.asarray(std) * np.sqrt(1 / n_ours + 1 / n_theirs) + 1e-9
    assert (np.abs(np.subtract(ours, theirs)) <= limit).all(), (
        f"{name} is {ours}, the reference's {theirs}, four standard errors {limit}"
    )


# --- block masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, match", _cases("mask_stats", r"[^/]+/(?=seeded_masks)"))
def test_seeded_block_masks_equal_the_reference(file, match):
    record = _record(GOLDENS / file, match.group())
    names = ("seeded_seeds", "seeded_targets", "seeded_masks")
    for seed, target, expected in zip(*(record[name] for name in names), strict=True):
        rng, cap = random.Random(int(seed)), float(record["max_num_patches"])
        mask = masking.block_mask(rng, len(expected), int(target), cap)
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("file, match", _cases("mask_stats", r"[^/]+/(?=targets)"))
def test_statistics_of_block_masks(file, match):
    record = _record(GOLDENS / file, match.group())
    grid, cap = record["cell_prob"].shape[-1], float(record["max_num_patches"])
    # For a whole number of patches the reference's floors do not depend on the patch's size.
    assert masking.max_block_patches(grid * 14, 14) == cap
    n = int(record["n_per_target"])
    rng, draws = random.Random(0), MORE * n
    for i, target in enumerate(record["targets"].tolist()):
        masks = np.stack([masking.block_mask(rng, grid, target, cap) for _ in range(draws)])
        counts = masks.sum((1, 2))
        edges = (masks[:, 1:] ^ masks[:, :-1]).sum((1, 2))
        edges += (masks[:, :, 1:] ^ masks[:, :, :-1]).sum((1, 2))
        edges = edges / np.maximum(counts, 1)
        hit = record["frac_hitting_target_exactly"][i]
        hit_std = np.sqrt(max(hit * (1 - hit), 1 / n))  # a share of 0 or 1 says "about 1 / n"
        for name, values, std in [
            ("count_mean", counts, record["count_std"][i]),
            ("frac_hitting_target_exactly", counts == target, hit_std),
            ("boundary_edges_per_masked_cell", edges, edges.std()),
        ]:
            _assert_equal_means(values.mean(), record[name][i], std, draws, n, f"{target}: {name}")
        quantiles = np.quantile(counts, np.array([1, 5, 25, 50, 75, 95, 99]) / 100)
        expected = record["count_quantiles_1_5_25_50_75_95_99"][i]
        assert counts.max() <= target and np.abs(quantiles - expected).max() <= 1
        cells = np.abs(masks.mean(0) - record["cell_prob"][i]).max()
        assert cells < 0.05 * np.sqrt(4000 / n), f"{target}: probability of a cell off by {cells}"


@pytest.mark.parametrize("file, match", _cases("collate_masks", r"[^/]+/(?=upperbound)"))
def test_masks_of_a_batch(file, match):
    record = _record(GOLDENS / file, match.group())
    image_size, patch_size, images = record["img_patch_nimg"].tolist()
    probability, *ratio = record["prob_lo_hi"].tolist()
    crops, patches = 2 * images, (image_size // patch_size) ** 2
    masked = int(record["n_samples_masked"])
    np.testing.assert_array_equal(masking.strata(masked, ratio), record["linspace_f32"])
    budget = masking.token_budget(crops, patches, probability, ratio)
    assert budget == record["upperbound"]
    n = int(record["reps"])
    draws = MORE * n
    sizes = {"crops": crops, "image_size": image_size, "patch_size": patch_size}
    masks = [
        masking.group_masks(0, step, 0, **sizes, probability=probability, ratio=ratio)
        for step in range(draws)
    ]
    counts = np.sort([mask.sum(1) for mask in masks], axis=1)
    totals = counts.sum(1)
    assert counts.shape[1] == crops and totals.max() <= budget
    assert (counts > 0).sum(1).max() == record["n_images_masked"].max() == masked
    mean, std = record["total_masked_mean"], record["total_masked_std"]
    _assert_equal_means(totals.mean(), mean, std, draws, n, "total")
    # One image's count falls short only now and then: a share of 1 / n of the draws is scatter.
    mean, std = record["sorted_per_image_count_mean"], np.maximum(counts.std(0), 1 / np.sqrt(n))
    std = np.where(mean > 0, std, 0)
    _assert_equal_means(counts.mean(0), mean, std, draws, n, "count of the images by rank")


# --- augmentation: views have one channel, so of the reference's records the grey ones are compared -------------


def _mirror(x: np.ndarray) -> tuple:
    """(ours, part of the reference's) of the largest square at the left border, mirrored."""
    side = min(x.shape)
    mirrored = jax.jit(augment.resized_crop, static_argnums=2)(x, (0, 0, side, side), side, True)
    return mirrored, np.s_[:side, x.shape[1] - side :]


OPERATIONS = {  # name with its parameters -> function of (levels, parameters, box), tolerance
    r"brightness_(.+)": (lambda x, box, f: augment.brightness(x, float(f)), 1),
    r"contrast_(.+)": (lambda x, box, f: augment.contrast(x, float(f)), 1),
    r"solarize_(.+)": (lambda x, box, t: augment.solarize(x, float(t)), 1),
    r"blur_k\d+_sigma(.+)": (lambda x, box, s: augment.gaussian_blur(x, float(s)), 1),
    r"resized_crop_bicubic_(\d+)": (lambda x, box, n: augment.resized_crop(x, box, int(n)), 1),
    r"grayscale3|saturation_.+": (lambda x, box: x, 1),  # they leave grey as it is
    r"hue_.+": (lambda x, box: x, 2),
}


@pytest.mark.parametrize("file, match", _cases("augment_ops", r"out/gray/(.+)"))
def test_operations_on_grey_images(monkeypatch, file, match):
    with np.load(GOLDENS / file) as arrays:
        x = arrays["in/gray_HWC"][..., 0].astype(np.float32)
        expected, box = arrays[match.group()].astype(np.float32), arrays["cfg/crop_box_ijhw"]
    if taps := re.match(r"blur_k(\d+)", match.group(1)):
        monkeypatch.setattr(augment, "BLUR_RADIUS", int(taps.group(1)) // 2)
    if match.group(1) == "hflip":
        (ours, part), tolerance = _mirror(x), 0
        expected = expected[part]
    else:
        found = [(o, m) for p, o in OPERATIONS.items() if (m := re.fullmatch(p, match.group(1)))]
        assert len(found) == 1, f"{match.group(1)} is none of {[*OPERATIONS]}"
        (operation, tolerance), parameters = found[0]
        ours = jax.jit(lambda x, box: operation(x, box, *parameters.groups()))(x, box)
    assert np.abs(np.asarray(ours) - expected).max() <= tolerance


@pytest.mark.parametrize("kind", ["augment_ops", "augment_stats"])
def test_colour_rows_are_left_out(kind):
    rows = 0
    for path in GOLDENS.glob(f"{kind}*.npz"):
        with np.load(path) as arrays:
            rows += sum(bool(re.match(r"out/color/|.+/P_rgb_", key)) for key in arrays.files)
    pytest.skip(f"{rows} colour rows of {kind} are left out: a view has one channel")


def _drawn(shape: tuple[int, int], kind: str, n: int, settings=augment.DINOV2) -> augment.Draw:
    @jax.jit
    def sample(keys):
        return jax.vmap(lambda key: augment.draw(key, settings, shape, augment.KINDS.index(kind)))(
            keys
        )

    return sample(jax.random.split(jax.random.key(0), n))


FIRED = {  # hue is one part of the jitter, which fires as a whole
    "gaussian_blur": lambda draw: draw.sigma > 0,
    "solarize": lambda draw: draw.threshold < augment.NO_SOLARIZE,
    "adjust_hue": lambda draw: draw.brightness != 1,
    "hflip": lambda draw: draw.flip,
}


@pytest.mark.parametrize("file, match", _cases("augment_stats", r"([^/]+)/P_(?!rgb_)(.+)"))
def test_how_often_an_operation_fires(file, match):
    kind, name = match.groups()
    with np.load(GOLDENS / file) as arrays:
        expected, n = float(arrays[match.group()]), int(arrays["cfg/n"])
    ours = np.mean(FIRED[name](_drawn((64, 64), kind, MORE * n)))
    p = (MORE * ours + expected) / (MORE + 1)
    _assert_equal_means(ours, expected, np.sqrt(p * (1 - p)), MORE * n, n, name)


@pytest.mark.parametrize(
    "file, match", _cases("augment_stats", r"rrc/[^/0-9]+(\d+)x?(\d*)/([^/]+)/(?=scale)")
)
def test_geometry_of_random_crops(file, match):
    height, width, kind = match.groups()
    shape = int(height), int(width or height)
    record = _record(GOLDENS / file, match.group())
    n, scale = int(_record(GOLDENS / file, "cfg/")["n"]), tuple(record["scale"].tolist())
    settings = augment.ViewSettings(crop_scale_mode="area", global_scale=scale, local_scale=scale)
    kind = "local" if kind == "local" else "global1"
    h, w = np.asarray(_drawn(shape, kind, MORE * n, settings).box, np.float64)[:, 2:].T
    for name, values in [
        ("h_mean_std_min_max", h),
        ("w_mean_std_min_max", w),
        ("area_frac_mean_std", h * w / np.prod(shape)),
        ("log_aspect_mean_std", np.log(w / h)),
    ]:
        mean, std, *ends = record[name]
        _assert_equal_means(values.mean(), mean, std, MORE * n, n, name)
        # The error of a standard deviation is std / sqrt(2 n), less for tails lighter than normal.
        _assert_equal_means(values.std(), std, std / np.sqrt(2), MORE * n, n, f"std of {name}")
        if ends:  # extremes of n draws scatter on the scale of a few per cent of the range
            span = 0.05 * (ends[1] - ends[0])
            assert np.abs(np.subtract(ends, [values.min(), values.max()])).max() <= span


# --- Hugging Face and the files of releases -----------------------------------------------------------------------

HF_TOLERANCE = dict(rtol=1e-4, atol=2e-4)


def golden_backbone(golden: dict) -> dict:
    return trees.flatten(backbone_params(under(golden, "hub_param/"), "golden"))


def hf_network(golden: dict) -> vit.ViT:
    """The network of a golden's weights, whose number of heads only the outputs tell: it is the one that fits best."""
    arrays = golden_backbone(golden)
    heads = golden.get("cfg/num_heads", np.int64(1)).item()
    network = vit.ViT(**sources.dinov2_fields(arrays, "golden", [], heads=heads))
    if "cfg/num_heads" in golden:
        return network
    size, params = network.image_size, trees.unflatten(arrays)
    images, expected = pixels(golden[f"in/{size}/u8"], 48), golden[f"out/{size}/hub_cls"]

    def error(heads: int) -> float:
        return np.abs(network.clone(heads=heads).apply({"params": params}, images)["cls"] - expected).max()

    return network.clone(heads=min((h for h in range(1, network.width + 1) if network.width % h == 0), key=error))


@pytest.mark.parametrize("path, size", records("hf_parity", r"in/(\d+)/u8"))
def test_the_hub_and_hugging_face(path, size):
    """The same weights in both: they differ where position embeddings are resized, and we follow either."""
    golden = load(path)
    network, params = hf_network(golden), trees.unflatten(golden_backbone(golden))
    images = pixels(golden[f"in/{size}/u8"], 48)
    hub, hf = (network.clone(offset=offset).apply({"params": params}, images) for offset in (network.offset, 0.0))
    registers = jnp.zeros((len(images), 0, network.width)) if not network.registers else hf["registers"]
    found = {
        "hub_cls": hub["cls"], "hub_patch": hub["patches"], "hf_pooler_output": hf["cls"],
        "hf_last_hidden_state": jnp.concatenate([hf["cls"][:, None], registers, hf["patches"]], axis=1),
    }
    compared = [name for name in found if f"out/{size}/{name}" in golden]
    assert compared
    for name in compared:
        np.testing.assert_allclose(found[name], golden[f"out/{size}/{name}"], **HF_TOLERANCE, err_msg=name)


@pytest.mark.parametrize("path", records("hf_parity"))
def test_names_of_the_hub_and_of_hugging_face(path):
    golden = load(path)
    hub, ours = under(golden, "hub_param/"), golden_backbone(golden)
    theirs = formats.write("hf_dinov2", ours, path.name)
    expected = {name: tuple(shape) for name, shape in under(golden, "hf_param_name/").items()}
    assert {name: value.shape for name, value in theirs.items()} == expected
    for foreign, name in [(theirs, "hf_dinov2"), (hub, "dinov2")]:
        found, modules = formats.read(foreign, path.name)
        assert found == name and modules["backbone"].keys() == ours.keys()
        for key, value in formats.write("dinov2", modules["backbone"], path.name).items():
            assert value.dtype == hub[key].dtype
            np.testing.assert_array_equal(value, hub[key], err_msg=key)


@pytest.mark.parametrize("path", records("hf_processor"))
def test_the_released_processor(path):
    golden = load(path)
    size = golden["cfg/size"].item()
    found = encoders.square(golden["in/u8_HW"], Preprocess(size, size, **encoders.RAD_DINO))
    np.testing.assert_allclose(found, golden["out/ch0"], atol=1e-5)


def inventories(kind: str = "") -> list:
    """One case (names -> shapes, parameters) per inventory of released names, additions with what they add to."""
    found = []
    for path in sorted(GOLDENS.glob("checkpoint_keys*.json")):
        content = json.loads(path.read_text())
        counts = content.get("counts", {})
        whole = {name: keys for name, keys in content.items() if name != "counts"}
        for name, keys in whole.items():
            if name.endswith("_extra"):  # e.g. registers, beside the longest inventory whose name its own begins with
                base = max((n for n in whole if n != name and name.startswith(n)), key=len)
                keys, count = whole[base] | keys, counts.get(base, 0) + counts.get(name, 0)
            else:
                count = counts.get(name, 0)
            if kind in name:
                found.append(pytest.param(keys, count, id=f"{path.stem}-{name}"))
    return found or [pytest.param(None, 0, marks=pytest.mark.skip(f"no checkpoint_keys file in {GOLDENS}"))]


def as_arrays(shapes: dict) -> dict[str, np.ndarray]:
    """Arrays of those shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def shapes_of(arrays: dict) -> dict:
    return {name: list(value.shape) for name, value in arrays.items()}


@pytest.mark.parametrize("keys, count", inventories())
def test_names_and_shapes_of_released_files(keys, count):
    """They are all of a network that we have, no more and no less, and are written again as they were."""
    name, modules = formats.read(as_arrays(keys), "golden")
    (module, arrays), = modules.items()
    if module == "dino_head":
        prototypes, bottleneck = arrays["last_layer/weight_v"].shape
        layers = [value for key, value in arrays.items() if key.endswith("kernel")]
        network = DINOHead(prototypes, layers[0].shape[1], bottleneck, len(layers))
        tree = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, layers[0].shape[0])))["params"]
    else:
        network = vit.ViT(**sources.dinov2_fields(arrays, "golden", []))
        tree = encoders.expected_params(network, network.image_size)
    assert shapes_of(trees.flatten(tree)) == shapes_of(arrays)
    assert trees.count(tree) == count
    written = shapes_of(formats.write(name, arrays, "golden"))
    assert written == shapes_of(rules.unchunk(as_arrays(keys)))


@pytest.mark.parametrize("keys, count", inventories("hub_"))
def test_the_hub_in_the_names_of_hugging_face(keys, count):
    """Each hub file becomes one whose names Hugging Face's reader knows, with every number in it, and back."""
    _, modules = formats.read(as_arrays(keys), "golden")
    theirs = formats.write("hf_dinov2", modules["backbone"], "golden")
    assert sum(value.size for value in theirs.values()) == count
    released = [case.values for case in inventories("hf_") if case.values[1] == count]
    for names, _ in released:
        assert shapes_of(theirs) == names
    _, back = formats.read(theirs, "golden")
    assert shapes_of(formats.write("dinov2", back["backbone"], "golden")) == keys
