"""Frozen features of films, computed once and kept on disk: any encoder, or plain pixels, over any source.

    found = features.cached(encoder, films, "cls+patches", folder)    # float32 [n, D], memory-mapped

A cache is named by everything that its numbers depend on: weights, network, how films are prepared, the bytes of each
film, the kind of feature, and the code that computes them. So a change of any of these finds no cache, rather than an
old one. A file gets its name when it is whole.
Letters: n films, D width, S pixels per side.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import raddino_jax
from raddino_jax import logs
from raddino_jax.data import pairs, pipeline, store
from raddino_jax.models import vit

PIXELS = 32  # side of the grey raster that every encoder has to beat
CODE = (
    "data/*.py", "models/*.py", "encoders.py", "preprocess.py",
    *(f"evals/{name}.py" for name in ("features", "patches", "frames", "heads")),
)  # fmt: skip


class Films(Sequence):
    """Films `index` of a source, uint8 [H, W], read when they are asked for: large sets do not fit in memory."""

    def __init__(self, source, index: np.ndarray):
        self.source, self.index = source, np.asarray(index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> np.ndarray:
        return self.source.film(int(self.index[place]))

    def digest(self) -> str:
        """Of the bytes that the films are read from, in their order, without decoding them."""
        found = hashlib.sha256(f"{type(self.source).__name__} {getattr(self.source, 'image_size', '')}".encode())
        for place, film in enumerate(self.index):
            data = _bytes(self.source, int(film), lambda place=place: self[place])
            found.update(len(data).to_bytes(8, "little"))
            found.update(data)
        return found.hexdigest()


def _bytes(source, film: int, read: Callable[[], np.ndarray]) -> bytes:
    if isinstance(source, pipeline.Folder):
        return source.files[film].read_bytes()
    if isinstance(source, store.Prepared):
        return source.records[int(source.films[film])]
    if isinstance(source, pairs.Pairs):
        return source.raw(film)
    pixels = read()
    return repr(pixels.shape).encode() + pixels.tobytes()


# --- the cache ------------------------------------------------------------------------------------------------


def cached(encoder, films: Films, feature: str, folder: Path, batch: int = 32, threads: int = 2) -> np.ndarray:
    """Features float32 [n, D] of films by an encoder, "pixels" for the grey raster; feature: a key of vit.FEATURES.

    Read from `folder` where they are there, else computed and put there. Memory-mapped, read-only.
    """
    about = {"feature": "raster" if encoder == "pixels" else feature, "encoder": identity(encoder)}
    compute = _rasters if encoder == "pixels" else lambda films: _encoded(encoder, films, feature, batch, threads)
    return kept(about, films, Path(folder).expanduser(), compute)


def squares(films: Films, cut: Callable[[np.ndarray], np.ndarray], about: dict, folder: Path) -> np.ndarray:
    """Levels uint8 [n, S, S] of films as `cut` makes them, kept like features; about: what `cut` depends on."""
    return kept({"feature": "squares"} | about, films, Path(folder).expanduser(), lambda films: map(_one(cut), films))


def _one(cut):
    return lambda film: cut(film)[None]


def identity(encoder) -> dict[str, str]:
    """What an encoder's numbers depend on, apart from the films."""
    if encoder == "pixels":
        return {"raster": str(PIXELS)}
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(encoder.params):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.asarray(leaf).tobytes())
    return {
        "weights": found.hexdigest(), "network": repr(encoder.network), "preprocess": repr(encoder.settings),
        "vector": encoder.feature, "dtype": encoder.dtype,
    }  # fmt: skip


def _code() -> str:
    root, found = Path(raddino_jax.__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in root.glob(pattern)):
        found.update(path.read_bytes())
    return found.hexdigest()


def kept(about: dict, films: Films, folder: Path, compute: Callable) -> np.ndarray:
    """What compute(films) yields, rows of films in their order; from `folder` where it is there. Memory-mapped.

    about: all that the rows depend on beside the films and CODE.
    """
    about = about | {"films": films.digest(), "count": len(films), "code": _code()}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{key}.npy"
    found = _opened(path, len(films))
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        _fill(path, films, compute)
        logs.write_whole(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")  # for a person
        found = _opened(path, len(films))
    return found


def _opened(path: Path, count: int) -> np.ndarray | None:
    """The array of a cache; None where there is none, or where a copy of it was cut short."""
    try:
        found = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError) as error:
        logs.say(f"features: {path} cannot be read ({error}); computing them again")
        return None
    return found if len(found) == count else None


def _fill(path: Path, films: Films, compute: Callable) -> None:
    """Write rows as they come under a name of this process, and give the file its own name when all are there."""
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        out, done, walk = None, 0, Walk(len(films))
        for rows in compute(films):
            if out is None:
                shape = (len(films), *rows.shape[1:])
                out = np.lib.format.open_memmap(temporary, "w+", rows.dtype, shape)
            out[done : done + len(rows)] = rows
            done += len(rows)
            walk.tell(done)
        out.flush()
        del out
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Walk:
    """Where a long walk through films is, every ten seconds."""

    def __init__(self, films: int):
        self.films, self.began = films, time.perf_counter()
        self.told = self.began

    def tell(self, done: int) -> None:
        """`done` films lie behind."""
        now = time.perf_counter()
        if now - self.told > 10:
            rate, self.told = done / (now - self.began), now
            logs.say(f"features: film {done}/{self.films}, {rate:.1f}/s, eta "
                     f"{logs.duration((self.films - done) / rate)}")


# --- the numbers ----------------------------------------------------------------------------------------------


def _encoded(encoder, films: Sequence, feature: str, batch: int, threads: int):
    """Features of films in batches; the next films are decoded while the device works on these."""
    starts = range(0, len(films), batch)
    blank = np.zeros((encoder.image_size, encoder.image_size, 1), np.float32)

    with ThreadPoolExecutor(threads) as pool:
        def ahead(start):
            places = range(start, min(start + batch, len(films)))
            return [pool.submit(lambda i=i: encoder.preprocess([films[i]])[0]) for i in places]

        waiting = ahead(0)
        for start in starts:
            ready = [future.result() for future in waiting]
            waiting = ahead(start + batch)
            # Padded: one shape, one compilation.
            out = encoder(np.stack(ready + [blank] * (batch - len(ready) if len(films) > batch else 0)))
            yield np.asarray(vit.FEATURES[feature](out), np.float32)[: len(ready)]


def _rasters(films: Sequence):
    for film in films:
        yield raster(film)[None]


def raster(film: np.ndarray) -> np.ndarray:
    """A film as 32 x 32 mean grey values."""
    return np.asarray(Image.fromarray(film).resize((PIXELS, PIXELS), Image.Resampling.BOX), np.float32).ravel()


def encode(encoder, films: Sequence[np.ndarray], feature: str, batch: int = 64) -> np.ndarray:
    """Features [n, D] of films that lie in memory, without a cache; feature: a key of `vit.FEATURES`."""
    return np.concatenate(list(_encoded(encoder, films, feature, batch, 1)))
