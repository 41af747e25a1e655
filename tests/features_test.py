"""Features on disk: what is kept is what is computed, and whatever it depends on makes it anew."""

import numpy as np
import pytest
import torch
from PIL import Image

from raddino_jax import encoders
from raddino_jax.data import pipeline
from raddino_jax.evals import features
from raddino_jax.evals.features import Films
from raddino_jax.models import vit
from raddino_jax.models.vit import ViT


def encoder_of(seed=0, **changes):
    network = ViT(width=16, depth=1, heads=2, patch_size=8, image_size=24)
    params = encoders.random_params(network, 24)
    params["cls_token"] = params["cls_token"] + seed
    settings = encoders.Preprocess(24, 24, (0.5,), (0.25,), **changes)
    return encoders.Encoder("tiny", network, params, settings)


def folder(tmp_path, n=5):
    (tmp_path / "films").mkdir(exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 26), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "films" / f"f{i}.png")
    return Films(pipeline.Folder(str(tmp_path / "films"), 26), np.arange(n))


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "kept").glob("*.npy"))


@pytest.fixture
def counted(monkeypatch):
    calls, encoded = [], features._encoded
    monkeypatch.setattr(features, "_encoded", lambda *args: calls.append(1) or encoded(*args))
    return calls


def test_what_is_kept_is_what_the_encoder_says(tmp_path, counted):
    films, encoder = folder(tmp_path), encoder_of()
    found = features.cached(encoder, films, "cls+patches", tmp_path / "kept", batch=2)
    out = encoder(encoder.preprocess([films[i] for i in range(5)]))
    np.testing.assert_allclose(found, vit.FEATURES["cls+patches"](out), atol=1e-5)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    again = features.cached(encoder, films, "cls+patches", tmp_path / "kept", batch=4)
    np.testing.assert_array_equal(found, again)
    assert len(counted) == 1 and len(kept(tmp_path)) == 1


def other_pixels(tmp_path, films):
    path = tmp_path / "films" / "f3.png"
    Image.fromarray(np.zeros((30, 26), np.uint8)).save(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, f, e, m: (f, encoder_of(seed=1), "cls"),
        lambda t, f, e, m: (f, encoder_of(resample="bilinear"), "cls"),
        lambda t, f, e, m: (f, e, "cls+patches"),
        lambda t, f, e, m: (Films(f.source, f.index[::-1]), e, "cls"),
        lambda t, f, e, m: (Films(f.source, f.index[:4]), e, "cls"),
        lambda t, f, e, m: (Films(pipeline.Folder(str(t / "films"), 24), f.index), e, "cls"),
        lambda t, f, e, m: other_pixels(t, f) or (f, e, "cls"),
        lambda t, f, e, m: m.setattr(features, "_code", lambda: "other code") or (f, e, "cls"),
        lambda t, f, e, m: (f, "pixels", "cls"),
    ],
    ids=["weights", "preprocessing", "feature", "order", "fewer", "size", "a film's bytes", "code", "pixels"],
)
def test_whatever_features_depend_on_makes_them_anew(tmp_path, monkeypatch, change):
    films, encoder = folder(tmp_path), encoder_of()
    features.cached(encoder, films, "cls", tmp_path / "kept")
    films, encoder, feature = change(tmp_path, films, encoder, monkeypatch)
    found = features.cached(encoder, films, feature, tmp_path / "kept")
    fresh = features.cached(encoder, films, feature, tmp_path / "elsewhere")
    np.testing.assert_array_equal(found, fresh)
    assert len(kept(tmp_path)) == 2


def test_half_a_file_is_never_taken_for_a_whole_one(tmp_path, counted):
    films, encoder = folder(tmp_path), encoder_of()
    whole = np.array(features.cached(encoder, films, "cls", tmp_path / "kept"))
    path = next((tmp_path / "kept").glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-40])  # a copy that was cut short
    np.testing.assert_array_equal(features.cached(encoder, films, "cls", tmp_path / "kept"), whole)
    assert len(counted) == 2


def test_a_run_that_dies_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    films, encoder = folder(tmp_path), encoder_of()
    read = Films.__getitem__
    monkeypatch.setattr(Films, "__getitem__", lambda self, i: read(self, i) if i < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        features.cached(encoder, films, "cls", tmp_path / "kept", batch=2)
    assert not list((tmp_path / "kept").iterdir())


def test_rasters_and_squares_are_kept_too(tmp_path):
    films = folder(tmp_path)
    found = features.cached("pixels", films, "cls", tmp_path / "kept")
    np.testing.assert_array_equal(found[2], features.raster(films[2]))
    squares = features.squares(films, lambda film: film[:20, :20], {"side": 20}, tmp_path / "kept")
    assert squares.dtype == np.uint8 and (squares[1] == films[1][:20, :20]).all() and len(kept(tmp_path)) == 2


def test_regions_are_those_of_adaptive_pooling():
    for h, w in ((6, 6), (37, 37), (7, 5), (2, 2)):
        patches = np.random.default_rng(h).normal(size=(2, h, w, 4)).astype(np.float32)
        pooled = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(patches).permute(0, 3, 1, 2), 3)
        np.testing.assert_allclose(
            vit.grid_means(patches), pooled.permute(0, 2, 3, 1).reshape(2, -1), atol=1e-5)
        if h == w:
            np.testing.assert_allclose(vit.grid_means(patches.reshape(2, h * w, 4)), vit.grid_means(patches))
