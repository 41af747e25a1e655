"""Films to squares against the code that prepares them elsewhere, and films that are none."""

import jax.numpy as jnp
import numpy as np
import pytest
from encoders_test import chexzero_pipeline, small, torchvision_pipeline
from PIL import Image

from raddino_jax import encoders
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.data import images
from raddino_jax.preprocess import square

transformers = pytest.importorskip("transformers")

SIZES = [(56, 56), (56, 57), (57, 56), (61, 56), (97, 131), (131, 97), (200, 63), (20, 31), (57, 73)]


def sized(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width), np.uint8)


@pytest.mark.parametrize("resize, crop", [(56, 56), (64, 56), (63, 56)])
def test_squares_as_hugging_face_makes_them(resize, crop):
    """Pillow's processor exactly; half a pixel of margin goes to the same side."""
    sides = dict(size={"shortest_edge": resize}, crop_size={"height": crop, "width": crop})
    processor = transformers.BitImageProcessorPil(**sides, image_mean=[0.5307] * 3, image_std=[0.2583] * 3)
    settings = Preprocess(resize, crop, **encoders.RAD_DINO)
    for size in SIZES:
        film = sized(*size)
        theirs = processor(Image.fromarray(film), return_tensors="np")["pixel_values"][0, 0]
        np.testing.assert_allclose(square(film, settings), theirs, atol=1e-5, err_msg=str(size))


@pytest.mark.parametrize("name", ["biomedclip", "mrm"])
def test_squares_as_torchvision_makes_them(name):
    row = small(name, None, resize=63, crop=56)
    pipeline = torchvision_pipeline(row.preprocess)
    for size in SIZES:
        film = sized(*size)
        levels = pipeline(film).astype(np.float32) / 255
        theirs = (levels - np.mean(row.preprocess.mean)) / np.mean(row.preprocess.std)
        np.testing.assert_allclose(square(film, row.preprocess), theirs, atol=1e-5, err_msg=str(size))


def test_squares_of_chexzero():
    row = small("chexzero", None, crop=40, pad=64)
    for size in SIZES:
        theirs = chexzero_pipeline(sized(*size), 64, 40)[0]
        np.testing.assert_allclose(
            square(sized(*size), row.preprocess), theirs, atol=1e-5, err_msg=str(size)
        )


def test_standardised_as_in_training():
    from raddino_jax import augment

    settings = Preprocess(64, 64, **encoders.RAD_DINO, standardize=True)
    speck = np.zeros((64, 64), np.uint8)
    speck[9, 7] = 1
    for film in (sized(64, 64), speck):
        found = square(film, settings)
        np.testing.assert_allclose(found, augment.standardize(jnp.asarray(film / np.float32(255))), atol=1e-5)
    found = square(sized(64, 64), settings)
    assert abs(found.mean()) < 1e-5 and abs(found.std() - 1) < 1e-3
    for level in (0, 77, 255):
        assert (square(np.full((64, 64), level, np.uint8), settings) == 0).all()


@pytest.mark.parametrize(
    "settings", [row.preprocess for row in encoders.ENCODERS.values()], ids=encoders.ENCODERS
)
def test_constant_and_extreme_films(settings):
    for film in [np.zeros((70, 90), np.uint8), np.full((70, 90), 255, np.uint8), sized(3, 150), sized(1, 1)]:
        found = square(film, settings)
        assert found.shape == (settings.crop,) * 2 and found.dtype == np.float32 and np.isfinite(found).all()


def test_what_is_no_film():
    settings = encoders.ENCODERS["rad_dino"].preprocess
    for wrong in [np.zeros((9, 9), np.float32), np.zeros((9, 9), np.uint16), np.zeros((9, 9, 3), np.uint8)]:
        with pytest.raises(TypeError, match=r"uint8 \[H, W\], as data.images.read gives it"):
            square(wrong, settings)
    with pytest.raises(images.TooLarge, match="a strip"):
        square(np.zeros((2, 5000), np.uint8), settings)
