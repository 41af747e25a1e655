"""Schedules in closed form, parameter groups, and updates against torch's AdamW."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raddino_jax import optim, train
from raddino_jax import params as trees
from raddino_jax.augment import ViewSettings

# --- durations and schedules --------------------------------------------------------------------


@pytest.mark.parametrize(
    "duration, steps",
    [
        ((250, "steps"), 250),
        ((2.5, "epochs"), 50),  # of 20 steps
        ((1000, "images"), 31),  # in batches of 32: 31.25
        ((10, "percent"), 40),  # of 400 steps
        ((0, "epochs"), 0),
        ([3, "steps"], 3),  # as a config read from JSON has it
    ],
)
def test_a_duration_is_in_steps_epochs_images_or_percent(duration, steps):
    found = optim.to_steps(duration, run_steps=400, batch_size=32, epoch_steps=20)
    assert found == steps and isinstance(found, int)


def test_an_epoch_may_be_a_broken_number_of_steps():
    assert optim.to_steps((10, "epochs"), 0, 32, epoch_steps=586 / 32) == 183


def test_an_unknown_unit_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="steps, epochs, images, percent"):
        optim.to_steps((3, "days"), 400, 32, 20)


@pytest.mark.parametrize("base, final, total, warmup", [(1.0, 0.1, 40, 10), (0.04, 0.4, 7, 0)])
def test_cosine_is_a_ramp_through_both_ends_then_half_a_cosine(base, final, total, warmup):
    ramp = list(np.linspace(0, base, warmup))
    n = total - warmup
    fall = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * j / n)) for j in range(n)]
    expected = ramp + fall + [final] * 3
    found = optim.cosine(np.arange(total + 3), base, final, total, warmup)
    np.testing.assert_allclose(found, expected, rtol=1e-12)  # float64
    traced = jax.jit(lambda i: optim.cosine(i, base, final, total, warmup))(jnp.arange(total + 3))
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-7)  # float32


def test_warm_up_starts_at_zero_and_reaches_its_base_twice():
    values = optim.cosine(np.arange(20), 1.0, 0.1, 100, 10)
    assert values[0] == 0 and values[9] == values[10] == 1 and values[11] < 1
    assert optim.cosine(np.arange(3), 1.0, 0.1, 100, 1)[0] == 0  # one step of warm-up, too


def test_linear_is_inclusive_of_both_ends_then_constant():
    expected = [*np.linspace(0.04, 0.07, 6), 0.07, 0.07]
    np.testing.assert_allclose(optim.linear(np.arange(8), 0.04, 0.07, 6), expected, rtol=1e-12)
    assert optim.linear(0, 0.04, 0.07, 0) == 0.07


SCHEDULES = optim.Schedules(
    total=50, lr=(0.002, 1e-6), lr_warmup=5, weight_decay=(0.04, 0.4), momentum=(0.992, 1.0),
    teacher_temperature=(0.04, 0.07), teacher_temperature_warmup=20, freeze_last_layer=3,
    head_warmup=8,
)  # fmt: skip


def test_every_scheduled_value_is_its_own_curve_and_freezes_end_in_time():
    index = np.arange(60)
    found = SCHEDULES.at(index)
    lr = optim.cosine(index, 0.002, 1e-6, 50, 5)
    expected = {
        "lr": lr,
        "last_layer_lr": lr * (index >= 3),
        "backbone_lr": lr * (index >= 8),
        "weight_decay": optim.cosine(index, 0.04, 0.4, 50),
        "momentum": optim.cosine(index, 0.992, 1.0, 50),
        "teacher_temp": optim.linear(index, 0.04, 0.07, 20),
    }
    assert found.keys() == expected.keys()
    traced = jax.jit(SCHEDULES.at)(jnp.asarray(index))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        np.testing.assert_allclose(traced[name], values, rtol=1e-4, atol=1e-8, err_msg=name)  # float32
    assert found["momentum"][-1] == 1 and found["lr"][-1] == 1e-6


def test_the_peak_learning_rate_follows_the_batch_by_the_chosen_rule():
    factors = {rule: factor(640) for rule, factor in optim.SCALING.items()}
    assert factors == {"none": 1, "sqrt_1024": math.sqrt(640 / 1024), "linear_256": 2.5}
    np.testing.assert_allclose(1e-3 * factors["sqrt_1024"], 7.9057e-4, rtol=1e-5)


# --- parameter groups ---------------------------------------------------------------------------

LR_FACTORS = {  # ViT-B, layer decay 0.9, patch embedding 0.2
    "backbone/cls_token": 0.25418658,
    "backbone/pos_embed": 0.25418658,
    "backbone/mask_token": 0.25418658,
    "backbone/register_tokens": 0.25418658,
    "backbone/patch_embed/kernel": 0.05083732,
    "backbone/patch_embed/bias": 0.05083732,
    "backbone/blocks_0/attn/qkv/kernel": 0.28242954,
    "backbone/blocks_1/norm1/scale": 0.9**11,
    "backbone/blocks_10/mlp/fc1/bias": 0.81,
    "backbone/blocks_11/ls2/gamma": 0.9,
    "backbone/norm/scale": 1.0,
    "dino_head/mlp_0/kernel": 1.0,
    "dino_head/last_layer/weight_g": 1.0,
    "ibot_head/mlp/bias": 1.0,
}
DECAYED = {
    "backbone/cls_token", "backbone/pos_embed", "backbone/mask_token", "backbone/register_tokens",
    "backbone/patch_embed/kernel", "backbone/blocks_0/attn/qkv/kernel", "dino_head/mlp_0/kernel",
    "dino_head/last_layer/weight_g",
}  # fmt: skip


def test_learning_rates_decay_by_layer_from_the_last_to_the_first():
    found = optim.lr_factors(LR_FACTORS, 12, 0.9, 0.2)
    for name, factor in LR_FACTORS.items():
        np.testing.assert_allclose(found[name], factor, rtol=1e-7, err_msg=name)


def test_biases_norms_and_layerscale_have_no_weight_decay_and_tokens_have():
    found = optim.decay_factors(LR_FACTORS)
    assert {name for name, factor in found.items() if factor} == DECAYED
    assert set(found.values()) == {0.0, 1.0}


def test_a_parameter_that_no_group_covers_is_an_error_with_its_name():
    with pytest.raises(ValueError, match="backbone/blocks_2/attn/qkv/kernel"):
        optim.lr_factors(["backbone/norm/scale", "backbone/blocks_2/attn/qkv/kernel"], 2, 0.9, 0.2)


def test_prototypes_are_the_last_layer_and_nothing_else_is():
    names = [name for name in LR_FACTORS if optim.is_last_layer(name)]
    assert names == ["dino_head/last_layer/weight_g"]


# --- updates ------------------------------------------------------------------------------------


def _tree(seed: int, scale: float = 1.0) -> dict:
    """A backbone of one block and a head, with few parameters of every group."""
    rng = np.random.default_rng(seed)
    names = [
        "backbone/cls_token", "backbone/patch_embed/kernel", "backbone/patch_embed/bias",
        "backbone/blocks_0/attn/qkv/kernel", "backbone/blocks_0/norm1/scale",
        "backbone/norm/bias", "dino_head/mlp_0/kernel", "dino_head/mlp_0/bias",
        "dino_head/last_layer/weight_g", "dino_head/last_layer/weight_v",
    ]  # fmt: skip
    draw = lambda: (scale * rng.normal(size=(3, 2))).astype(np.float32)  # noqa: E731
    return trees.unflatten({name: draw() for name in names})


PLAIN = optim.Optimizer(depth=1, clip=0.0, layer_decay=0.7, patch_embed_factor=0.2)


@functools.partial(jax.jit, static_argnums=0)
def _update(optimizer, student, grads, state, schedule):
    return optimizer.update(student, grads, state, schedule)


def _schedule(**values) -> dict:
    base = dict(lr=0.01, last_layer_lr=0.01, backbone_lr=0.01, weight_decay=0.3)
    return {name: np.float32(value) for name, value in (base | values).items()}


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_steps_equal_those_of_torch_adamw_with_the_same_groups(scale):
    """float32, 2e-6 of parameters of about 1. Gradients of 1e-8 show where eps stands."""
    torch = pytest.importorskip("torch")
    student = _tree(0)
    flat = trees.flatten(student)
    theirs = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in flat.items()}
    lr, decay = optim.lr_factors(flat, 1, 0.7, 0.2), optim.decay_factors(flat)
    adamw = torch.optim.AdamW(
        [dict(params=[p], lr=0.01 * lr[n], weight_decay=0.3 * decay[n]) for n, p in theirs.items()],
        betas=PLAIN.betas, eps=PLAIN.eps,
    )  # fmt: skip
    state = PLAIN.init(student)
    for step in range(3):
        grads = _tree(10 + step, scale)
        student, state, _ = _update(PLAIN, student, grads, state, _schedule())
        for name, grad in trees.flatten(grads).items():
            theirs[name].grad = torch.from_numpy(grad)
        adamw.step()
    for name, p in trees.flatten(student).items():
        np.testing.assert_allclose(p, theirs[name].detach().numpy(), atol=2e-6, err_msg=name)


def test_each_module_is_clipped_by_its_own_norm_and_norms_are_those_before():
    grads = _tree(1)
    grads["dino_head"] = jax.tree.map(lambda g: g / 100, grads["dino_head"])
    clipped = dataclasses.replace(PLAIN, clip=3.0)
    norms = {m: math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(t))) for m, t in grads.items()}
    assert norms["backbone"] > 3 > norms["dino_head"]
    by_hand = grads | {
        "backbone": jax.tree.map(lambda g: g * 3 / (norms["backbone"] + 1e-6), grads["backbone"])
    }
    student, state = _tree(0), PLAIN.init(_tree(0))
    _, moments, found = _update(clipped, student, grads, state, _schedule())
    _, expected, _ = _update(PLAIN, student, by_hand, state, _schedule())
    assert found.keys() == norms.keys()
    for module, norm in norms.items():
        np.testing.assert_allclose(found[module], norm, rtol=1e-5)  # float32
    for ours, theirs in zip(*map(jax.tree.leaves, (moments, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_frozen_last_layer_stands_still_while_its_moments_run_and_its_gradient_is_clipped_with():
    student, grads = _tree(0), _tree(1)
    state = PLAIN.init(student)
    frozen = _schedule(last_layer_lr=0.0)
    optimizer = dataclasses.replace(PLAIN, clip=1.0)
    after, moments, norms = _update(optimizer, student, grads, state, frozen)
    for name, p in trees.flatten(after).items():
        still = np.array_equal(p, trees.flatten(student)[name])
        assert still == optim.is_last_layer(name), name
    whole = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads["dino_head"])))
    np.testing.assert_allclose(norms["dino_head"], whole, rtol=1e-5)
    mean = moments.mu["dino_head"]["last_layer"]["weight_v"]
    expected = 0.1 * grads["dino_head"]["last_layer"]["weight_v"] / whole
    np.testing.assert_allclose(mean, expected, rtol=1e-4)  # float32
    assert moments.count == 1


def test_head_warm_up_leaves_the_backbone_exactly_as_it_was_and_moves_the_heads():
    student, grads = _tree(0), _tree(1)
    schedule = {**_schedule(), **jax.tree.map(np.float32, SCHEDULES.at(5))}
    assert schedule["backbone_lr"] == 0 < schedule["lr"]
    after, _, _ = _update(PLAIN, student, grads, PLAIN.init(student), schedule)
    for name, p in trees.flatten(after).items():
        same = np.array_equal(p, trees.flatten(student)[name])
        assert same == name.startswith("backbone/"), name


def test_weight_decay_pulls_only_what_it_should_by_learning_rate_times_decay():
    """Without gradients Adam's step is 0, and what is left is p * (1 - lr * factor * decay)."""
    student = _tree(0)
    zero = jax.tree.map(np.zeros_like, student)
    after, _, _ = _update(PLAIN, student, zero, PLAIN.init(student), _schedule())
    flat = trees.flatten(student)
    lr, decay = optim.lr_factors(flat, 1, 0.7, 0.2), optim.decay_factors(flat)
    for name, p in trees.flatten(after).items():
        kept = 1 - 0.01 * lr[name] * 0.3 * decay[name]
        np.testing.assert_allclose(p, flat[name] * kept, rtol=1e-6, err_msg=name)  # float32


# --- one update of the state, with an objective of two lines ------------------------------------


@dataclasses.dataclass(frozen=True)
class Pull:
    """Pulls every parameter of the student to the teacher's plus one; the temperature is a metric."""

    backbone = types.SimpleNamespace(dtype=jnp.float32)

    def __call__(self, student, teacher, centres, views, masks, key, temperature):
        gap = jax.tree.map(lambda s, t: ((s - t - 1) ** 2).sum(), student, teacher)
        return sum(jax.tree.leaves(gap)), ({"temperature": temperature}, centres)


def test_an_update_moves_the_student_then_the_teacher_towards_the_moved_student():
    schedules = dataclasses.replace(
        SCHEDULES, momentum=(0.5, 0.5), freeze_last_layer=0, head_warmup=0
    )
    step = train.Step(Pull(), PLAIN, schedules, ViewSettings(), 0.0, 1.0, 0)
    student, teacher = _tree(0), _tree(3)
    state = train.TrainState(jnp.int32(7), student, teacher, PLAIN.init(student), {})
    run = jax.jit(train.update, static_argnums=4)
    after, metrics = run(state, {}, None, jax.random.key(0), step)
    grads = jax.tree.map(lambda s, t: 2 * (s - t - 1), student, teacher)
    values = schedules.at(7)
    moved, _, norms = _update(PLAIN, student, grads, state.opt, _schedule(
        **{k: values[k] for k in ("lr", "last_layer_lr", "backbone_lr", "weight_decay")}
    ))  # fmt: skip
    assert after.step == 8
    np.testing.assert_allclose(metrics["temperature"], values["teacher_temp"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm_backbone"], norms["backbone"], rtol=1e-5)
    for name, s in trees.flatten(after.student).items():
        np.testing.assert_allclose(s, trees.flatten(moved)[name], rtol=1e-5, atol=1e-6, err_msg=name)
        mean = 0.5 * trees.flatten(teacher)[name] + 0.5 * s
        np.testing.assert_allclose(trees.flatten(after.teacher)[name], mean, rtol=1e-6, err_msg=name)


def test_the_teacher_is_a_moving_average_of_every_parameter():
    teacher, student = _tree(0), _tree(1)
    found = trees.flatten(optim.ema(teacher, student, 0.9))
    for name, value in found.items():
        expected = 0.9 * trees.flatten(teacher)[name] + 0.1 * trees.flatten(student)[name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7, err_msg=name)
    still = trees.flatten(optim.ema(teacher, student, 1.0))
    assert all(np.array_equal(value, trees.flatten(teacher)[name]) for name, value in still.items())
