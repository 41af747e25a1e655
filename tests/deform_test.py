"""Deformations: films and masks move together, each part does what it says, draws follow their key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from raddino_jax.evals import deform
from raddino_jax.evals.deform import Deformation

STILL = dict(affine=0.0, elastic=0.0, flip=0.0, intensity=0.0)


def disc(size=48, row=20, column=28, radius=9):
    y, x = np.mgrid[:size, :size]
    return ((y - row) ** 2 + (x - column) ** 2 < radius**2).astype(np.uint8)


def moved(seed=0, film=None, mask=None, **settings):
    mask = disc() if mask is None else mask
    film = 200.0 * mask if film is None else film
    run = jax.jit(lambda key: deform.deform(key, jnp.asarray(film, jnp.float32), jnp.asarray(mask)[..., None],
                                            Deformation(**(STILL | settings))))
    film, mask = run(jax.random.key(seed))
    return np.asarray(film), np.asarray(mask)[..., 0]


def test_without_chances_nothing_moves():
    film, mask = moved()
    np.testing.assert_array_equal(mask, disc())
    np.testing.assert_array_equal(film, 200.0 * disc())


@pytest.mark.parametrize("settings", [dict(affine=1.0), dict(elastic=1.0, elastic_alpha=200.0), dict(flip=1.0)])
def test_film_and_mask_move_together(settings):
    film, mask = moved(3, **settings)
    assert (mask != disc()).any()
    assert ((film > 100) != mask).mean() < 0.005


def test_a_turned_film_is_that_of_scipy():
    """The matrix found by where three points of a linear film came from, applied by scipy."""
    settings = Deformation(**(STILL | dict(affine=1.0, shear=0.0, rotation=30.0)))
    key = jax.random.split(jax.random.key(5))[0]
    rows, columns = deform.displaced(key, (48, 48), settings)
    angle = np.arctan2(float(columns[1, 0] - columns[0, 0]), float(rows[1, 0] - rows[0, 0]))
    assert 0 < abs(np.degrees(angle)) <= 30
    film, mask = moved(5, affine=1.0, shear=0.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([23.5, 23.5])
    expected = ndimage.affine_transform(200.0 * disc(), turn, centre - turn @ centre, order=1)
    np.testing.assert_allclose(film, expected, atol=0.51)  # levels are whole numbers
    nearest = ndimage.affine_transform(disc(), turn, centre - turn @ centre, order=0)
    assert (mask != nearest).mean() < 0.002


def test_a_flip_is_a_mirror_image():
    film, mask = moved(flip=1.0)
    np.testing.assert_array_equal(mask, disc()[:, ::-1])
    np.testing.assert_array_equal(film, 200.0 * disc()[:, ::-1])


def test_elastic_fields_have_the_strength_of_blurred_noise():
    """Uniform noise of variance 1/3 under a Gaussian of sigma s keeps 1 / (4 pi s^2) of it."""
    settings = Deformation(elastic_alpha=34.0, elastic_sigma=4.0)
    field = np.asarray(deform.elastic(jax.random.key(0), 200, settings))[:, 20:-20, 20:-20]
    assert field.std() == pytest.approx(34 * (1 / 3 / (4 * np.pi * 16)) ** 0.5, rel=0.15)
    blurred = ndimage.gaussian_filter(np.random.default_rng(0).uniform(-1, 1, (200, 200)), 4)
    assert field.std() == pytest.approx(34 * blurred.std(), rel=0.2)


def test_exposure_changes_films_and_no_masks():
    film = 255 * np.random.default_rng(0).random((48, 48))
    lit, mask = moved(1, film=film, intensity=1.0)
    np.testing.assert_array_equal(mask, disc())
    assert np.abs(lit - film).mean() > 3 and lit.min() >= 0 and lit.max() <= 255
    order = np.argsort(film.ravel())
    assert (np.diff(lit.ravel()[order]) >= 0).all()  # a curve of grey values: none overtakes another


def test_draws_follow_their_key():
    again, first, other = (moved(seed, affine=1.0, elastic=1.0, intensity=1.0)[0] for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_ignored_pixels_move_along():
    mask = 255 * disc()
    _, found = moved(2, mask=mask, film=np.zeros((48, 48)), affine=1.0)
    assert set(np.unique(found)) == {0, 255}
