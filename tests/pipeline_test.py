"""The host side of a batch: slots, resume, hosts, shuffles, weights, windows, sources.

A film of the fake source is filled with its own number, so a batch shows which films it holds.
"""

import threading

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from raddino_jax import masking
from raddino_jax.data import pipeline

SEED = 5
SPEC = pipeline.MaskSpec(group_size=2, image_size=16, patch_size=4, probability=0.5, ratio=(0.1, 0.5))


class Numbered:
    """Films of one size that show `first` + index; knows which were read."""

    kind = "synthetic"

    def __init__(self, films: int, first: int = 0, shape=(20, 20)):
        self.films, self.first, self.shape, self.read = films, first, shape, []

    def __len__(self):
        return self.films

    def film(self, index):
        self.read.append(index)
        return np.full(self.shape, self.first + index, np.uint8)


def _data(**fields) -> ConfigDict:
    base = dict(
        sources=("synthetic",), weights=(), data_dir="", image_size=20, window="random",
        synthetic_size=6, threads=2, prefetch=2, cache_gib=0.0, fraction=1.0,
    )  # fmt: skip
    return ConfigDict(base | fields)


def _batches(sources, batch=8, steps=6, start=0, first=0, count=None, **fields) -> list[dict]:
    rows = pipeline.Rows(first, batch if count is None else count, batch)
    return list(
        pipeline.batches(
            _data(**fields), rows=rows, steps=steps, start=start, seed=SEED, masks=SPEC, sources=sources
        )
    )


def _assert_equal(found: list[dict], expected: list[dict]):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() == {"images", "masks", "film"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- slots --------------------------------------------------------------------------------------


def test_a_batch_has_bytes_packed_masks_and_the_identity_of_each_row():
    batch = _batches([Numbered(50)], steps=1)[0]
    assert batch["images"].shape == (8, 20, 20) and batch["images"].dtype == np.uint8
    assert batch["masks"].shape == (8, 2, 2) and batch["masks"].dtype == np.uint8  # 16 bits
    np.testing.assert_array_equal(batch["images"][:, 0, 0], batch["film"][:, 1])
    np.testing.assert_array_equal(batch["film"][:, 0], 0)


@pytest.mark.parametrize("start", [1, 3, 5, 6])
def test_a_run_resumed_at_any_step_sees_what_an_uninterrupted_one_sees(start):
    sources = [Numbered(11, shape=(24, 20)), Numbered(7, first=100)]
    _assert_equal(_batches(sources, start=start), _batches(sources)[start:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_exactly_the_batch_of_one_host(hosts):
    sources = [Numbered(11, shape=(24, 20)), Numbered(7, first=100)]
    share = 8 // hosts
    parts = [_batches(sources, first=host * share, count=share) for host in range(hosts)]
    together = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    _assert_equal(together, _batches(sources))


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (8, 4)])
def test_threads_prefetch_and_cache_change_no_number(threads, prefetch):
    cached = pipeline.Cached(Numbered(11), budget=5 * 400)
    found = _batches([cached], threads=threads, prefetch=prefetch)
    _assert_equal(found, _batches([Numbered(11)]))


def test_every_pass_over_a_source_is_a_permutation_and_each_another_one():
    films = np.concatenate([b["film"][:, 1] for b in _batches([Numbered(10)], batch=4, steps=10)])
    passes = films.reshape(4, 10)
    for one in passes:
        assert sorted(one) == list(range(10))
    assert len({tuple(one) for one in passes}) == 4


def test_the_seed_decides_the_order():
    rows = pipeline.Rows(0, 8, 8)
    orders = []
    for seed in (1, 1, 2):
        found = pipeline.batches(
            _data(), rows=rows, steps=3, start=0, seed=seed, masks=SPEC, sources=[Numbered(50)]
        )
        orders.append(np.concatenate([b["film"][:, 1] for b in found]).tolist())
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("weights, share", [((), 0.75), ((1.0, 3.0), 0.25), ((2, 2), 0.5)])
def test_sources_are_mixed_by_weight_or_else_by_size(weights, share):
    """Sources of 30 and 10 films; each keeps its own permutation."""
    sources = [Numbered(30), Numbered(10, first=100)]
    film = np.concatenate([b["film"] for b in _batches(sources, batch=40, steps=10, weights=weights)])
    np.testing.assert_allclose((film[:, 0] == 0).mean(), share, atol=0.01)
    for number, source in enumerate(sources):
        drawn = film[film[:, 0] == number, 1]
        whole = len(drawn) // len(source) * len(source)
        for one in drawn[:whole].reshape(-1, len(source)):
            assert sorted(one) == list(range(len(source)))


# --- masks --------------------------------------------------------------------------------------


def test_masks_are_those_of_step_and_group_within_the_batch():
    for step, batch in enumerate(_batches([Numbered(50)], steps=3)):
        masks = np.unpackbits(batch["masks"], axis=-1, count=16).astype(bool)
        for group in range(4):
            expected = masking.group_masks(
                SEED, step, group, crops=4, image_size=16, patch_size=4, probability=0.5,
                ratio=(0.1, 0.5),
            )  # fmt: skip
            np.testing.assert_array_equal(masks[2 * group : 2 * group + 2].reshape(4, 16), expected)


@pytest.mark.parametrize("patches", [16, 36, 1369])
def test_packed_masks_unpack_to_what_they_were(patches):
    masks = np.random.default_rng(0).random((3, 2, patches)) < 0.3
    packed = pipeline.pack(masks)
    assert packed.dtype == np.uint8 and packed.shape == (3, 2, -(-patches // 8))
    np.testing.assert_array_equal(np.unpackbits(packed, axis=-1, count=patches), masks)


# --- windows ------------------------------------------------------------------------------------


class Ramp(Numbered):
    """Films of 20 x 80 whose columns show their number."""

    def film(self, index):
        return np.broadcast_to(np.arange(80, dtype=np.uint8), (20, 80))


def test_a_random_window_is_keyed_by_slot_and_reaches_both_ends():
    batches = _batches([Ramp(3)], batch=40, steps=10)
    left = np.concatenate([b["images"][:, 0, 0] for b in batches])
    assert left.min() == 0 and left.max() == 60 and len(set(left.tolist())) > 50
    for image in batches[0]["images"]:
        np.testing.assert_array_equal(image - image[0, 0], np.broadcast_to(np.arange(20), (20, 20)))
    again = np.concatenate([b["images"][:, 0, 0] for b in _batches([Ramp(70)], batch=40, steps=10)])
    np.testing.assert_array_equal(left, again)  # whatever film lies in the slot


def test_a_centre_window_is_in_the_middle():
    for batch in _batches([Ramp(3)], steps=2, window="centre"):
        assert (batch["images"][:, 0, 0] == 30).all()


def test_a_window_of_an_evaluation_is_the_centre():
    film = np.broadcast_to(np.arange(80, dtype=np.uint8), (20, 80))
    found = pipeline.square(_data())(film)
    np.testing.assert_array_equal(found, film[:, 30:50])


# --- sources ------------------------------------------------------------------------------------


def _save(path, shape=(30, 24), level=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, shape[0] * shape[1]).reshape(shape).astype(np.uint8)
    Image.fromarray(ramp if level is None else np.full(shape, level, np.uint8)).save(path, **kwargs)


def test_a_folder_is_read_with_all_below_it_in_the_order_of_paths(tmp_path):
    for i, name in enumerate(["b/deep/er/1.PNG", "a.png", "b/0.jpg", "c/x.jpeg"]):
        _save(tmp_path / name, level=50 * i)
    for name in ["notes.txt", "table.csv", "b/page.html"]:
        (tmp_path / name).write_text("no film")
    source = pipeline.Folder(str(tmp_path), 12)
    assert [str(p.relative_to(tmp_path)) for p in source.files] == [
        "a.png", "b/0.jpg", "b/deep/er/1.PNG", "c/x.jpeg"
    ]  # fmt: skip
    assert len(source) == 4 and source.kind == "real"
    levels = [int(np.round(source.film(i).mean())) for i in range(4)]
    np.testing.assert_allclose(levels, [50, 100, 0, 150], atol=1)


def test_what_a_folder_holds_beside_its_films_is_no_film(tmp_path):
    """Hidden files and folders, and files without a suffix that do not begin like an image."""
    _save(tmp_path / "a.png")
    _save(tmp_path / "b" / "film.png")
    (tmp_path / "b" / "film.png").rename(tmp_path / "b" / "film")
    _save(tmp_path / ".old" / "c.png")
    for name in [".DS_Store", "._a.png", "b/._film", "README", "b/Makefile"]:
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 no film")
    files = pipeline.Folder(str(tmp_path), 12).files
    assert [p.relative_to(tmp_path).as_posix() for p in files] == ["a.png", "b/film"]


def test_a_folder_may_lie_in_a_hidden_one(tmp_path):
    _save(tmp_path / ".cache" / "films" / "a.png")
    assert len(pipeline.Folder(str(tmp_path / ".cache" / "films"), 12)) == 1


@pytest.mark.parametrize("shape, expected", [((30, 24), (15, 12)), ((24, 50), (12, 25)), ((6, 8), (12, 16))])
def test_a_film_of_a_folder_has_its_short_side_resized(tmp_path, shape, expected):
    _save(tmp_path / "film.png", shape)
    film = pipeline.Folder(str(tmp_path), 12).film(0)
    assert film.shape == expected and film.dtype == np.uint8
    assert film[0, 0] < 20 and film[-1, -1] > 235


def test_a_broken_film_is_an_error_that_names_the_file_and_a_batch_takes_another_for_it(tmp_path):
    for i in range(3):
        _save(tmp_path / f"{i}.png", (40, 40))
    broken = tmp_path / "deep" / "1.png"
    broken.parent.mkdir()
    broken.write_bytes((tmp_path / "0.png").read_bytes()[:200])
    source = pipeline.Folder(str(tmp_path), 20)
    with pytest.raises(pipeline.DataError, match=str(broken)):
        source.film(source.files.index(broken))
    told = []
    found = list(pipeline.batches(
        _data(image_size=20), rows=pipeline.Rows(0, 8, 8), steps=6, start=0, seed=SEED, masks=SPEC, sources=[source],
        tell=told.append,
    ))
    films = np.concatenate([batch["film"][:, 1] for batch in found])
    assert len(told) == 1 and str(broken) in told[0] and "1 so far" in told[0]
    assert source.files.index(broken) not in films and len(set(films.tolist())) == 3


@pytest.mark.parametrize(
    "source, words",
    [
        ("folder:{}/nowhere", "nowhere.* not there.*folder:PATH"),
        ("folder:{}/empty", "holds no image files"),
        ("chexpert", "'chexpert' is not prepared.*'synthetic' and 'folder:PATH'"),
    ],
)
def test_a_source_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path, source, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(pipeline.DataError, match=words):
        pipeline.open_sources(_data(sources=(source.format(tmp_path),)))


def test_the_synthetic_source_is_the_same_at_every_opening():
    """Never a fallback: it has its own kind, which every log and result carries."""
    first, second = (pipeline.open_sources(_data())[0] for _ in range(2))
    assert len(first) == 6 and first.kind == "synthetic"
    film = first.film(3)
    assert film.shape == (20, 20) and film.dtype == np.uint8 and film.std() > 10
    np.testing.assert_array_equal(film, second.film(3))
    assert not np.array_equal(film, first.film(4))


def test_sources_come_in_the_order_of_their_names(tmp_path):
    _save(tmp_path / "film.png")
    sources = pipeline.open_sources(_data(sources=(f"folder:{tmp_path}", "synthetic")))
    assert [(s.kind, len(s)) for s in sources] == [("real", 1), ("synthetic", 6)]


# --- cache and fraction -------------------------------------------------------------------------


def test_a_cache_reads_each_film_once_up_to_its_budget():
    source = Numbered(5)
    cached = pipeline.Cached(source, budget=2 * 400 + 100)  # two films of 400 bytes and a bit
    for _ in range(3):
        for i in range(4):
            assert cached.film(i)[0, 0] == i
    assert [source.read.count(i) for i in range(4)] == [1, 1, 3, 3]
    assert len(cached) == 5 and cached.kind == "synthetic"


def test_a_cache_stays_within_its_budget_when_many_threads_read():
    cached = pipeline.Cached(Numbered(50), budget=10 * 400)
    threads = [threading.Thread(target=lambda: [cached.film(i) for i in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cached.films) == 10 and cached.budget == 0


def test_the_cache_of_a_config_is_shared_among_its_sources():
    sources = pipeline.open_sources(_data(sources=("synthetic",) * 2, cache_gib=1e-6))
    assert [source.budget for source in sources] == [pytest.approx(1e-6 * 2**30 / 2)] * 2


def test_a_fraction_is_always_the_same_films_and_inside_a_larger_one():
    source = Numbered(40)
    small, large = (pipeline.Fraction(source, share) for share in (0.25, 0.5))
    shown = [{int(s.film(i)[0, 0]) for i in range(len(s))} for s in (small, large)]
    assert (len(small), len(large)) == (10, 20) and [len(s) for s in shown] == [10, 20]
    assert shown[0] < shown[1]
    assert len(pipeline.Fraction(source, 1e-6)) == 1
    assert small.kind == "synthetic"
