"""Ways to keep films on disk, by size and by how fast a host reads them: why prepared datasets hold plain bytes.

    rows = encodings.compare(config.data)        # what `bench --what=data` may print with encodings.show(rows)

Each encoding is written to ArrayRecord as `prepare` would, and read at random by threads, page cache warm.
"""

import concurrent.futures
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from raddino_jax.data import pipeline, store


def _packed(kind: str, **options) -> Callable[[np.ndarray], bytes]:
    def pack(film: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(film).save(file, kind, **options)
        return file.getvalue()

    return pack


def _opened(record: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record)))


# name -> (ArrayRecord's options, film -> bytes or None for a TFDS record, bytes -> film or None likewise)
ENCODINGS = {
    "raw": (store.ENCODINGS["raw"], None, None),
    "zstd": (store.ENCODINGS["zstd"], None, None),
    "png": (store.ENCODINGS["raw"], _packed("PNG"), _opened),
    "jpeg 95": (store.ENCODINGS["raw"], _packed("JPEG", quality=95), _opened),
}


def compare(data, films: int = 64, seconds: float = 2.0, threads: int = 2) -> list[dict]:
    """Rows of {encoding, bytes_per_image, of_raw, images_per_second, difference} on films of the first source.

    data: `config.data`. seconds: of reading per encoding. difference: mean absolute, in grey values, to the film.
    """
    source = pipeline.open_sources(data)[0]
    taken = [source.film(index) for index in range(min(films, len(source)))]
    with tempfile.TemporaryDirectory() as folder:
        rows = [_measure(name, taken, Path(folder), seconds, threads) for name in ENCODINGS]
    return [row | {"of_raw": row["bytes_per_image"] / rows[0]["bytes_per_image"]} for row in rows]


def _measure(name: str, films: Sequence[np.ndarray], folder: Path, seconds: float, threads: int) -> dict:
    from array_record.python import array_record_data_source, array_record_module

    options, pack, unpack = ENCODINGS[name]
    path = folder / f"{name.replace(' ', '_')}.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    pack = pack or _record()
    for film in films:
        writer.write(pack(film))
    writer.close()
    records = array_record_data_source.ArrayRecordDataSource([str(path)])

    def read(index: int) -> np.ndarray:
        record = records[index]
        return unpack(record) if unpack else store.pixels(record, films[index].shape[1])

    difference = np.mean([np.abs(read(i).astype(np.int16) - film).mean() for i, film in enumerate(films)])
    return {
        "encoding": name, "bytes_per_image": path.stat().st_size / len(films), "difference": float(difference),
        "images_per_second": _rate(read, len(films), seconds, threads), "threads": threads,
        "height": films[0].shape[0], "width": float(np.mean([film.shape[1] for film in films])),
    }  # fmt: skip


def _record() -> Callable[[np.ndarray], bytes]:
    serialize = store.serializer(store.features((), (), {}))
    blank = {name: {str: "", float: 0.0, int: 0, bool: True}[store.COLUMNS[name]] for name in store.IN_RECORDS}
    return lambda film: serialize(blank | {"image": film[..., None]})


def _rate(read: Callable[[int], np.ndarray], films: int, seconds: float, threads: int) -> float:
    """Films per second, each copied once as into a batch."""
    order = itertools.cycle(np.random.default_rng(0).permutation(films).tolist())
    ends = time.perf_counter() + seconds

    def some(_) -> int:
        done = 0
        while time.perf_counter() < ends:
            read(next(order)).copy()
            done += 1
        return done

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(some, range(threads)))
    return done / (time.perf_counter() - began)


def show(rows: Sequence[dict]) -> str:
    """The rows as a table of text."""
    lines = [f"{'encoding':14s} {'bytes/image':>12s} {'of raw':>7s} {'images/s':>9s} {'difference':>10s}"]
    for row in rows:
        lines.append(
            f"{row['encoding']:14s} {row['bytes_per_image']:12,.0f} {row['of_raw']:7.1%} "
            f"{row['images_per_second']:9,.0f} {row['difference']:10.3f}"
        )
    return "\n".join(lines)
