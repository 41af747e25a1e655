"""Squares of films and back: levels against the encoder's own preprocessing, masks against PIL, predictions against
PyTorch."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from raddino_jax import encoders, preprocess
from raddino_jax.encoders import Preprocess
from raddino_jax.evals import frames

torch = pytest.importorskip("torch")

PLAIN = Preprocess(32, 32, (0.5,), (0.25,))


def film(height=50, width=70):
    rng = np.random.default_rng(height + width)
    return np.asarray(Image.fromarray(rng.integers(0, 256, (9, 11), np.uint8)).resize((width, height)))


@pytest.mark.parametrize("name", ["rad_dino", "biomedclip", "mrm", "biovil_t", "clip_vitl14_224"])
def test_levels_are_what_the_encoder_normalises(name):
    settings = dataclasses.replace(encoders.ENCODERS[name].preprocess, resize=40, crop=32)
    levels, _ = frames.framed(film(), settings)
    mean, std = np.mean(settings.mean), np.mean(settings.std)
    found = (levels.astype(np.float32) * settings.scale / 255 - mean) / std
    np.testing.assert_allclose(found, preprocess.square(film(), settings), atol=1e-5)


def test_chexzero_loses_half_a_level_at_most():
    """Its square is resized after normalisation, which leaves no whole levels."""
    settings = dataclasses.replace(encoders.ENCODERS["chexzero"].preprocess, pad=40, crop=32)
    levels, _ = frames.framed(film(), settings)
    found = (levels.astype(np.float32) - settings.mean[0]) / settings.std[0]
    expected = preprocess.square(film(), settings)
    inside = (expected > -settings.mean[0] / settings.std[0]) & (expected < (255 - settings.mean[0]) / settings.std[0])
    assert np.abs(found - expected)[inside].max() <= 0.5 / settings.std[0] + 1e-5


def tie(start: int, before: int, after: int) -> np.ndarray:
    """Whether the centre of a resized pixel lies between two of the film: PIL's sums of steps then go either way."""
    centre = (start + np.arange(after - start) + 0.5) * before / after
    return np.abs(centre - np.rint(centre)) < 1e-6


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (64, 64), (31, 97), (33, 32)])
@pytest.mark.parametrize("resize, crop", [(32, 32), (40, 32), (24, 24)])
def test_masks_are_cut_and_resized_as_pil_does(shape, resize, crop):
    settings = Preprocess(resize, crop, (0.5,), (0.25,))
    mask = (film(*shape) > 128).astype(np.uint8)
    _, frame = frames.framed(film(*shape), settings)
    found = frames.in_frame(mask[None], frame, crop)[0]
    short = min(shape)
    size = (resize * shape[1] // short, resize * shape[0] // short)
    resized = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    top, left = ((n - crop) // 2 for n in resized.shape)
    expected = resized[top : top + crop, left : left + crop]
    down, across = (
        ~tie(start, n, after) for start, n, after in zip((top, left), shape, resized.shape, strict=True)
    )
    np.testing.assert_array_equal(found[down[:crop]][:, across[:crop]], expected[down[:crop]][:, across[:crop]])


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_pad_and_stretch_show_the_whole_film(fit):
    mask = np.ones((1, 50, 70), np.uint8)
    levels, frame = frames.framed(film(), PLAIN, fit)
    found = frames.in_frame(mask, frame, 32)[0]
    if fit == "stretch":
        assert found.all() and frame == frames.Frame(0, 0, 50, 70)
    else:
        assert frame == frames.Frame(-10, 0, 70, 70)
        assert found[5:27].all() and not found[:4].any() and not found[28:].any()
        assert not levels[:3].any()
    over = frames.over_film(np.ones((1, 32, 32), np.float32), frame, (50, 70))
    np.testing.assert_allclose(over, 1, rtol=1e-6)


@pytest.mark.parametrize("shape", [(50, 70), (20, 24), (32, 32), (97, 31)])
def test_predictions_over_a_film_are_torchs_bilinear(shape):
    logits = np.random.default_rng(0).normal(size=(2, 32, 32)).astype(np.float32)
    frame = frames.Frame(0, 0, *shape)
    expected = torch.nn.functional.interpolate(torch.tensor(logits)[None], shape, mode="bilinear")[0].numpy()
    np.testing.assert_allclose(frames.over_film(logits, frame, shape), expected, atol=1e-5)


def test_nothing_is_predicted_outside_the_square():
    _, frame = frames.framed(film(50, 70), PLAIN)  # columns 10 to 59
    over = frames.over_film(np.ones((1, 32, 32), np.float32), frame, (50, 70))[0]
    assert (over[:, 10:60] > 0).all() and not over[:, :10].any() and not over[:, 60:].any()


@pytest.mark.parametrize("fit", frames.FITS)
def test_there_and_back_a_disc_stays_where_it_is(fit):
    y, x = np.mgrid[:60, :90]
    disc = ((y - 33) ** 2 + (x - 50) ** 2 < 15**2).astype(np.uint8)
    settings = Preprocess(128, 128, (0.5,), (0.25,))
    levels, frame = frames.framed(255 * disc, settings, fit)
    square = frames.in_frame(disc[None], frame, 128)[0]
    assert ((levels > 127) != square).mean() < 0.01
    back = frames.over_film(square[None] - 0.5, frame, disc.shape)[0] > 0
    overlap = 2 * (back & (disc > 0)).sum() / (back.sum() + disc.sum())
    assert overlap > 0.98
