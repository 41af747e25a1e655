"""Dice and the loss against MONAI, PyTorch and plain numpy; empty, full and ignored masks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raddino_jax.data.shapes import IGNORE
from raddino_jax.evals import dice

torch = pytest.importorskip("torch")


def sample(n=3, size=12, structures=2):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (n, size, size, structures)).astype(np.float32)
    masks = rng.random((n, size, size, structures)) < 0.4
    return logits, masks


def value(logits, masks, known=None):
    known = np.ones_like(masks) if known is None else known
    return float(dice.loss(dice.terms(jnp.asarray(logits), jnp.asarray(masks), jnp.asarray(known))))


def test_the_loss_is_monais_dice_and_torchs_cross_entropy():
    from monai.losses import DiceLoss

    logits, masks = sample()
    z, t = (torch.tensor(np.moveaxis(a, -1, 1).astype(np.float32)) for a in (logits, masks))
    expected = DiceLoss(sigmoid=True)(z, t) + torch.nn.functional.binary_cross_entropy_with_logits(z, t)
    assert value(logits, masks) == pytest.approx(float(expected), rel=1e-5)


def test_dice_is_monais_on_the_structures_that_are_there():
    from monai.metrics import DiceMetric

    logits, masks = sample()
    masks[1, ..., 0] = False
    metric = DiceMetric(include_background=True, reduction="none", ignore_empty=True)
    channels = [torch.tensor(np.moveaxis(a, -1, 1).astype(np.float32)) for a in (logits > 0, masks)]
    expected = metric(*channels).numpy()
    found = np.stack([
        dice.dice(np.moveaxis(z, -1, 0) > 0, np.moveaxis(m, -1, 0).astype(np.uint8))
        for z, m in zip(logits, masks, strict=True)
    ])
    np.testing.assert_allclose(found, expected, rtol=1e-6, equal_nan=True)
    assert np.isnan(found[1, 0]) and not np.isnan(found[1, 1])


def test_an_empty_mask_counts_for_cross_entropy_alone():
    """A structure that a film lacks has no Dice; what is predicted there still costs."""
    logits, masks = sample(n=1, structures=1)
    empty = np.zeros_like(masks)
    z = torch.tensor(logits)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z, torch.zeros_like(z))
    assert value(logits, empty) == pytest.approx(float(expected), rel=1e-5)
    assert dice.terms(jnp.asarray(logits), jnp.asarray(empty), jnp.ones_like(empty))["present"].sum() == 0


def test_a_full_mask_is_a_mask():
    logits, masks = sample(n=1, structures=1)
    full = np.ones_like(masks[0, ..., 0])[None].astype(np.uint8)
    np.testing.assert_allclose(dice.dice(full > 0, full), [1.0])
    np.testing.assert_allclose(dice.dice(np.zeros_like(full) > 0, full), [0.0])
    assert value(np.full_like(logits, 30.0), np.ones_like(masks)) == pytest.approx(0, abs=1e-4)


def test_ignored_pixels_change_nothing():
    logits, masks = sample()
    known = np.random.default_rng(1).random(masks.shape) < 0.7
    other, flipped = np.where(known, logits, -logits), np.where(known, masks, ~masks)
    assert value(logits, masks, known) == pytest.approx(value(other, flipped, known), rel=1e-6)
    assert value(logits, masks, known) != pytest.approx(value(logits, masks), rel=1e-3)
    truth = np.where(known, masks, IGNORE).astype(np.uint8)[0]
    expected = [
        2 * (p & m & k).sum() / ((p & k).sum() + (m & k).sum())
        for p, m, k in zip(*(np.moveaxis(a[0], -1, 0) for a in (logits > 0, masks, known)), strict=True)
    ]
    found = dice.dice(np.moveaxis(logits[0], -1, 0) > 0, np.moveaxis(truth, -1, 0))
    np.testing.assert_allclose(found, expected)


def test_the_loss_of_many_films_does_not_depend_on_batches():
    logits, masks = sample(n=5)
    masks[2, ..., 1] = False
    parts = [
        dice.terms(jnp.asarray(logits[i:j]), jnp.asarray(masks[i:j]), jnp.ones_like(masks[i:j]))
        for i, j in ((0, 2), (2, 5))
    ]
    summed = jax.tree.map(lambda a, b: a.sum() + b.sum(), *parts)
    assert float(dice.loss(summed)) == pytest.approx(value(logits, masks), rel=1e-6)


def test_gradients_are_finite_at_extremes():
    logits, masks = sample(n=1)
    for scale in (0.0, 1e4):
        grads = jax.grad(lambda z: dice.loss(dice.terms(z, masks, np.ones_like(masks))))(jnp.asarray(logits * scale))
        assert np.isfinite(grads).all()
    nothing = jax.grad(lambda z: dice.loss(dice.terms(z, masks, np.zeros_like(masks))))(jnp.asarray(logits))
    assert not np.any(nothing)


def test_what_is_predicted_where_there_is_nothing():
    truth = np.zeros((3, 4, 4), np.uint8)
    truth[1, 0], truth[2] = 1, IGNORE
    predicted = np.zeros((3, 4, 4), bool)
    predicted[:, :, :2] = True
    np.testing.assert_allclose(dice.falsely(predicted, truth), [0.5, np.nan, np.nan])


def test_structures_are_averaged_within_a_film_first():
    values = np.array([[1.0, 0.5], [np.nan, 0.2], [np.nan, np.nan]])
    np.testing.assert_allclose(dice.within(values), [0.75, 0.2, np.nan])


def test_the_interval_draws_patients():
    """Forty films of two patients say as little as two films; the mean itself is over films."""
    values = np.repeat([0.2, 0.8], 20)
    few = dice.summary(values, ["a"] * 20 + ["b"] * 20)
    many = dice.summary(values, [str(i) for i in range(40)])
    assert few["value"] == many["value"] == pytest.approx(0.5) and few["n"] == 40
    assert few["std"] == pytest.approx(np.std(values, ddof=1))
    assert few["interval"] == pytest.approx([0.2, 0.8])
    half = 1.96 * np.std(values) / 40**0.5
    assert many["interval"] == pytest.approx([0.5 - half, 0.5 + half], abs=0.02)


@pytest.mark.parametrize("values, expected", [
    ([np.nan, np.nan], {"value": None, "std": None, "n": 0, "interval": None}),
    ([np.nan, 0.5], {"value": 0.5, "std": None, "n": 1, "interval": [0.5, 0.5]}),
])  # fmt: skip
def test_what_few_films_cannot_say_is_null(values, expected):
    """JSON has no NaN: a file with it can be read by few."""
    found = dice.summary(np.array(values), ["a", "b"])
    assert found == expected
    json.dumps(found, allow_nan=False)
