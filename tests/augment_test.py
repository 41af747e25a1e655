"""Views: every operation against PIL and torchvision, the draws against their probabilities."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

from raddino_jax import augment

FIELDS = [name for name in augment.Draw._fields if name != "noise_key"]
TINY = augment.ViewSettings(global_size=28, local_size=14, local_crops=3, blur_global2=0.5, solarize=0.5)
PLAIN = dataclasses.replace(  # every operation off: a view is the image itself
    TINY, local_crops=0, global_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, jitter=0,
    blur_global2=0, solarize=0,
)  # fmt: skip


def _film(height=60, width=48, seed=0) -> np.ndarray:
    """uint8 with smooth parts, noise, hard edges and both ends of the range."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, height)[:, None] * np.linspace(0.2, 1, width)
    film = np.clip(ramp + rng.normal(0, 30, (height, width)), 0, 255)
    film[height // 4 : height // 2, width // 3 : width // 2] = 255
    film[-height // 4 :, : width // 4] = 0
    return film.astype(np.uint8)


SEED, SLOTS = 3, np.arange(8)
FILMS = np.stack([_film(seed=seed) for seed in range(8)])
_jitted_views = jax.jit(augment.views, static_argnames=("settings", "dtype"))


def _views(seed, images, slots, settings=TINY, mean=0.5, std=0.25, dtype=jnp.float32) -> dict:
    views = _jitted_views(jax.random.key(seed), images, settings, slots, mean, std, dtype)
    return jax.tree.map(np.asarray, views)


@functools.partial(jax.jit, static_argnames=("settings", "shape", "n"))
def _jitted_draws(settings, shape, n, kind):
    keys = jax.random.split(jax.random.key(1), n)
    return jax.vmap(lambda key: augment.draw(key, settings, shape, kind))(keys)


def _draws(settings, shape=(518, 518), n=4000, kind="global1") -> augment.Draw:
    drawn = _jitted_draws(settings, shape, n, augment.KINDS.index(kind))
    return drawn._replace(noise_key=None, **{f: np.asarray(getattr(drawn, f)) for f in FIELDS})


def _pil_crop(film: np.ndarray, box, size: int, flip: bool) -> np.ndarray:
    top, left, height, width = box
    image = Image.fromarray(film).crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(ImageOps.mirror(image) if flip else image, np.float32)


def _level_difference(ours, theirs) -> float:
    return np.abs(np.asarray(ours) - np.asarray(theirs, np.float32)).max()


@pytest.mark.parametrize(
    "box, size, flip",
    [
        ((0, 0, 60, 48), 28, False),  # shrink the whole image
        ((0, 0, 60, 48), 77, True),  # enlarge it
        ((12, 8, 30, 24), 30, False),  # one axis at its own size
        ((59, 47, 1, 1), 5, True),  # one pixel, in the last corner
        ((3, 40, 57, 8), 14, True),  # shrink one axis, enlarge the other, touch a border
    ],
)
def test_resized_crop_is_pil_crop_then_resize_then_mirror(box, size, flip):
    film = _film()
    ours = jax.jit(augment.resized_crop, static_argnums=2)(film, jnp.array(box), size, flip)
    assert _level_difference(ours, _pil_crop(film, box, size, flip)) <= 1


def test_resized_crop_keeps_whole_levels_and_does_not_see_beyond_its_box():
    film = _film()
    box = jnp.array([12, 8, 30, 24])
    crop = jax.jit(augment.resized_crop, static_argnums=2)
    inside = crop(film, box, 20)
    np.testing.assert_array_equal(inside, jnp.round(inside))
    framed = np.full_like(film, 255)
    framed[12:42, 8:32] = film[12:42, 8:32]
    np.testing.assert_array_equal(inside, crop(framed, box, 20))


@pytest.mark.parametrize("start, length, size", [(3, 41, 28), (0, 48, 77), (40, 8, 14), (7, 40, 5)])
def test_resampled_levels_are_exact_sums(start, length, size):
    """So that no order of adding gives others: half a level is rounded alike on every mesh and every device."""
    film = np.where(_film() > 127, 255, _film()).astype(np.float32)
    taps = augment._resampling(jnp.int32(start), jnp.int32(length), film.shape[1], size)
    exact = film.astype(np.float64) @ np.asarray(taps, np.float64).T
    np.testing.assert_array_equal(jnp.asarray(film) @ taps.T, exact)
    np.testing.assert_allclose(taps.sum(1), 1, atol=2e-4)


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.65, 1.0, 1.35, 1.4])
def test_brightness_and_contrast_are_pils(factor):
    film = _film()
    image, x = Image.fromarray(film), film.astype(np.float32)
    bright, contrasted = ImageEnhance.Brightness(image), ImageEnhance.Contrast(image)
    assert _level_difference(augment.brightness(x, factor), bright.enhance(factor)) <= 1
    assert _level_difference(augment.contrast(x, factor), contrasted.enhance(factor)) <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.3, 2.0])
def test_gaussian_blur_is_torchvisions(sigma):
    functional = pytest.importorskip("torchvision.transforms.functional")
    theirs = functional.gaussian_blur(Image.fromarray(_film()), [9, 9], [sigma, sigma])
    ours = jax.jit(augment.gaussian_blur)(_film().astype(np.float32), sigma)
    assert _level_difference(ours, theirs) <= 1


@pytest.mark.parametrize("threshold", [0, 128, 255])
def test_solarize_is_pils(threshold):
    theirs = ImageOps.solarize(Image.fromarray(_film()), threshold)
    assert _level_difference(augment.solarize(_film().astype(np.float32), threshold), theirs) == 0


@pytest.mark.parametrize(
    "operation, neutral",
    [
        (augment.brightness, 1.0),
        (augment.contrast, 1.0),
        (augment.gamma_curve, 1.0),
        (augment.gaussian_blur, 0.0),
        (augment.solarize, augment.NO_SOLARIZE),
    ],
)
def test_neutral_parameters_change_nothing(operation, neutral):
    x = _film().astype(np.float32)
    np.testing.assert_array_equal(jax.jit(operation)(x, neutral), x)


def test_gamma_curve_keeps_both_ends_and_bends_the_middle():
    levels = jnp.array([[0.0, 64.0, 255.0]])
    np.testing.assert_array_equal(augment.gamma_curve(levels, 0.5), [[0, 128, 255]])
    np.testing.assert_array_equal(augment.gamma_curve(levels, 2.0), [[0, 16, 255]])


@pytest.mark.parametrize("shape", [(518, 518), (300, 420)])
@pytest.mark.parametrize("kind", ["global1", "local"])
def test_area_boxes_have_the_distribution_of_torchvision(shape, kind):
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    settings, n, image = augment.DINOV2, 2000, torch.zeros(1, *shape)
    scale = settings.local_scale if kind == "local" else settings.global_scale
    get_params = transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, scale, settings.crop_ratio) for _ in range(n)])
    ours = _draws(settings, shape, n, kind).box
    for a, b in [(ours, theirs), (ours[:, 2:].prod(1), theirs[:, 2:].prod(1))]:
        error = np.sqrt((a.var(0) + b.var(0)) / n)
        assert (np.abs(a.mean(0) - b.mean(0)) < 4.5 * error).all()
        assert np.allclose(a.std(0), b.std(0), rtol=0.1)


@pytest.mark.parametrize("shape, expected", [((60, 60), (7, 0, 45, 60)), ((20, 90), (0, 31, 20, 27))])
def test_the_largest_central_box_where_no_candidate_fits(shape, expected):
    settings = dataclasses.replace(
        augment.DINOV2, global_scale=(1.0, 1.0), crop_ratio=(4 / 3, 1.34)
    )  # the whole area at an aspect that the image does not have
    np.testing.assert_array_equal(_draws(settings, shape, 20).box, [expected] * 20)


@pytest.mark.parametrize("kind, low, high", [("global1", 259, 518), ("local", 103.6, 259)])
def test_side_boxes_have_the_sides_of_the_paper(kind, low, high):
    settings = dataclasses.replace(augment.RAD_DINO, crop_ratio=(1.0, 1.0))
    box = np.asarray(_draws(settings, kind=kind).box)
    top, left, height, width = box.T
    np.testing.assert_array_equal(height, width)
    assert (box >= 0).all() and (top + height <= 518).all() and (left + width <= 518).all()
    edges = np.quantile(height, [0, 0.25, 0.5, 0.75, 1])
    assert np.allclose(edges, low + (high - low) * np.linspace(0, 1, 5), atol=0.03 * (high - low))


def test_boxes_of_any_aspect_stay_inside_and_reach_every_border():
    for shape in [(518, 518), (200, 518)]:
        top, left, height, width = np.asarray(_draws(augment.RAD_DINO, shape).box).T
        for start, length, pixels in [(top, height, shape[0]), (left, width, shape[1])]:
            assert (start >= 0).all() and (length > 0).all() and (start + length <= pixels).all()
            partial = length < pixels
            assert (start[partial] == 0).any() and (start + length == pixels)[partial].any()


@pytest.mark.parametrize("settings", [augment.RAD_DINO, augment.DINOV2], ids=["rad_dino", "dinov2"])
@pytest.mark.parametrize("kind", augment.KINDS)
def test_every_operation_fires_as_often_as_its_probability(settings, kind):
    n = 4000
    d = _draws(settings, n=n, kind=kind)
    fired = {
        "flip": (d.flip, settings.flip),
        "brightness": (d.brightness != 1, settings.jitter),
        "contrast": (d.contrast != 1, settings.jitter),
        "order": (d.brightness_first, 0.5),
        "blur": (d.sigma > 0, getattr(settings, f"blur_{kind}")),
        "solarize": (d.threshold < 256, settings.solarize if kind == "global2" else 0),
    }
    for name, (times, p) in fired.items():
        assert abs(np.mean(times) - p) <= 4.5 * np.sqrt(p * (1 - p) / n), name
    np.testing.assert_array_equal(d.brightness != 1, d.contrast != 1)  # one coin for both
    for values, low, high in [(d.brightness, 0.6, 1.4), (d.sigma[d.sigma > 0], 0.1, 2.0)]:
        values = np.asarray(values[values != 1])
        if values.size:
            assert low <= values.min() and values.max() <= high
            assert abs(values.mean() - (low + high) / 2) < 0.06 * (high - low)


def test_views_are_the_pil_pipeline_with_the_same_draws():
    """The chain as a whole: order of operations, keys, slots. Rounding adds up to a few levels."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    key, draw = jax.random.key(SEED), jax.jit(augment.draw, static_argnums=(1, 2))
    views = _views(SEED, FILMS, SLOTS, mean=0.0, std=1 / 255)
    for film, slot, pair in zip(FILMS, SLOTS, views["global"], strict=True):
        for number in range(2):
            view_key = jax.random.fold_in(jax.random.fold_in(key, slot), number)
            d = draw(view_key, TINY, film.shape, number)
            crop = _pil_crop(film, d.box.tolist(), TINY.global_size, bool(d.flip))
            image = Image.fromarray(crop.astype(np.uint8))
            enhance = [
                lambda i, d=d: ImageEnhance.Brightness(i).enhance(float(d.brightness)),
                lambda i, d=d: ImageEnhance.Contrast(i).enhance(float(d.contrast)),
            ]
            for step in enhance if d.brightness_first else reversed(enhance):
                image = step(image)
            if d.sigma > 0:
                image = functional.gaussian_blur(image, [9, 9], [float(d.sigma)] * 2)
            if d.threshold < 256:
                image = ImageOps.solarize(image, int(d.threshold))
            difference = np.abs(np.asarray(image, np.float32) - pair[number, ..., 0])
            assert difference.max() <= 4 and difference.mean() < 0.5


def test_views_have_their_shapes_and_differ_from_each_other():
    views = _views(SEED, FILMS, SLOTS)
    assert views["global"].shape == (8, 2, 28, 28, 1) and views["local"].shape == (8, 3, 14, 14, 1)
    for view in views.values():
        assert len(np.unique(view.reshape(-1, view[0, 0].size), axis=0)) == view[:, :, 0, 0].size


def test_with_every_operation_off_a_global_view_is_the_normalised_image():
    films = np.stack([_film(28, 28, seed=s) for s in range(8)])
    views = _views(SEED, films, SLOTS, settings=PLAIN)
    expected = np.stack([(films / 255.0 - 0.5) / 0.25] * 2, axis=1)
    np.testing.assert_allclose(views["global"][..., 0], expected, atol=1e-5)
    assert views["local"].shape == (8, 0, 14, 14, 1)


def _assert_same_draw(ours: np.ndarray, theirs: np.ndarray):
    """The same levels, all of them."""
    levels, others = (np.round(255 * (0.25 * view + 0.5)) for view in (ours, theirs))
    np.testing.assert_array_equal(levels, others)


def test_a_view_depends_on_key_and_slot_and_not_on_its_neighbours():
    whole = _views(SEED, FILMS, SLOTS)
    order = np.array([3, 0, 7, 5, 1, 2, 6, 4])
    halves = [_views(SEED, FILMS[half], SLOTS[half]) for half in (order[:4], order[4:])]
    again = _views(SEED, FILMS, SLOTS)
    for name in ("global", "local"):
        np.testing.assert_array_equal(again[name], whole[name])
        _assert_same_draw(np.concatenate([half[name] for half in halves]), whole[name][order])
    for other in [_views(SEED + 1, FILMS, SLOTS), _views(SEED, FILMS, SLOTS + 8)]:
        assert (np.abs(other["global"] - whole["global"]).max((1, 2, 3, 4)) > 0.1).all()


def test_views_are_the_same_on_one_device_and_on_all():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = _views(SEED, jax.device_put(FILMS, rows), jax.device_put(SLOTS, rows))
    for name, whole in _views(SEED, FILMS, SLOTS).items():
        _assert_same_draw(spread[name], whole)


def test_constant_images_stay_finite_and_standardised_views_have_unit_variance():
    settings = dataclasses.replace(TINY, standardize=True, gamma=0.3)
    images = np.stack([np.full((60, 48), level, np.uint8) for level in (0, 77, 255)] + [_film()])
    for view in _views(SEED, images, SLOTS[:4], settings=settings).values():
        assert (view[:3] == 0).all()
        np.testing.assert_allclose(view[3].mean((1, 2, 3)), 0, atol=1e-4)
        np.testing.assert_allclose(view[3].std((1, 2, 3)), 1, atol=1e-3)


def test_standardising_makes_no_picture_of_rounding_or_of_a_single_grey_level():
    plain, film = jnp.zeros((20, 20)), _film(20, 20) / np.float32(255)
    for level in (0.0, 77 / 255, 1.0):
        assert (augment.standardize(plain + level) == 0).all()
        wobbly = augment.standardize(plain.at[::2].add(1e-7) + level)
        assert np.abs(wobbly).max() < 1e-4, "rounding stays rounding"
        speck = augment.standardize(plain.at[7, 5].add(1 / 255) + level)
        np.testing.assert_allclose(speck[7, 5], 0.9975 / np.sqrt(1 + 0.0025), atol=1e-2)
    expected = (film - film.mean()) / np.sqrt(film.var() + 1 / 255**2)
    np.testing.assert_allclose(augment.standardize(jnp.asarray(film)), expected, atol=1e-5)
    brighter = augment.standardize(0.5 * jnp.asarray(film) + 0.2)
    np.testing.assert_allclose(brighter, expected, atol=1e-2)


def test_noise_has_up_to_its_strength_and_differs_by_view():
    settings, grey = dataclasses.replace(PLAIN, noise=0.4), np.full((8, 28, 28), 102, np.uint8)
    view = _views(SEED, grey, SLOTS, settings=settings, dtype=jnp.bfloat16)["global"]
    assert view.dtype == jnp.bfloat16
    noise = view.astype(np.float32).reshape(16, -1) - (102 / 255 - 0.5) / 0.25
    sd = noise.std(1)
    assert sd.max() < 0.45 and abs(sd.mean() - 0.2) < 0.12
    assert np.abs(np.corrcoef(noise) - np.eye(16)).max() < 0.2


def test_settings_come_from_a_config_and_name_what_is_wrong():
    fields = dataclasses.asdict(TINY)
    for config in [ConfigDict(fields), json.loads(json.dumps(fields))]:  # JSON makes lists of tuples
        settings = augment.ViewSettings(**config)
        assert settings == TINY and hash(settings) == hash(TINY)
    with pytest.raises(ValueError, match="crop_scale_mode is 'length'"):
        augment.ViewSettings(crop_scale_mode="length")
    with pytest.raises(ValueError, match="local_scale"):
        augment.ViewSettings(local_scale=(0.5, 0.2))


def test_the_reference_blurs_the_second_view_alone():
    d = augment.DINOV2
    assert (d.blur_global1, d.blur_global2, d.blur_local) == (0.0, 0.9, 0.5)
    d = augment.RAD_DINO
    assert (d.blur_global1, d.blur_global2, d.blur_local) == (0.0, 0.1, 0.5)
