"""A manifest -> shards: planned once, each written under a temporary name and renamed, never written twice.

The plan is a function of the manifest and the settings alone. It lies in WORK/plan.json with one task file per shard;
a finished shard has a file in WORK/done. After kill -9 the same command finds the same plan and goes on with the shards
that are not done; the result is the same to the byte. Any number of processes, or Apache Beam, may write shards.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from raddino_jax.data import images, shapes, store
from raddino_jax.data.datasets.manifest import Film, Manifest, ManifestError

SHARD_FILMS = 4096


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result beside the manifest.

    size: short side in pixels. mode: of `images.read`. shard_mib: pixels per file, 128 MiB are about 400 films of 518.
    """

    dataset: str
    name: str
    raw_dir: str
    size: int = 518
    mode: str = "raddino"
    encoding: str = "raw"
    shard_mib: float = 128


def plan(manifest: Manifest, settings: Settings, target: Path, work: Path) -> list[dict]:
    """Write the plan below `work`, or find it there; -> {"shard", "films"} of every shard.

    target: folder of the result. Raises ManifestError when `work` holds the plan of something else.
    """
    shards = _shards(manifest, settings)
    about = _about(manifest, settings) | {
        "plan": digest(manifest, settings),
        "target": str(target.resolve()),
        "shards": [{"shard": name, "films": len(films)} for name, films in shards],
    }
    path = work / "plan.json"
    if path.exists():
        if json.loads(path.read_text())["plan"] != about["plan"]:
            raise ManifestError(
                f"{work.parent} was begun from other files or with other settings: take those, remove the folder, or "
                "give another --name"
            )
        return about["shards"]
    (work / "done").mkdir(parents=True, exist_ok=True)
    for name, films in shards:
        write_whole(work / name, b"".join(_line(film) for film in films))
    write_whole(path, json.dumps(about).encode())
    return about["shards"]


def digest(manifest: Manifest, settings: Settings) -> str:
    """What tells one plan from another."""
    found = hashlib.sha256(json.dumps(_about(manifest, settings)).encode())
    for name, films in _shards(manifest, settings):
        found.update(name.encode())
        for film in films:
            found.update(_line(film))
    return found.hexdigest()


def _about(manifest: Manifest, settings: Settings) -> dict:
    more = {name: kind.__name__ for name, kind in manifest.more.items()}
    return dataclasses.asdict(settings) | {"labels": manifest.labels, "masks": manifest.masks, "more": more}


def _line(film: Film) -> bytes:
    return json.dumps([getattr(film, field) for field in Film.__slots__]).encode() + b"\n"


def _shards(manifest: Manifest, settings: Settings) -> list[tuple[str, list[Film]]]:
    """(file name, films) by split; films in an order that scatters patients and dates over all shards."""
    per_shard = max(1, min(SHARD_FILMS, int(settings.shard_mib * 2**20 / (1.2 * settings.size**2))))
    found = []
    for split in sorted({film.split for film in manifest.films}):
        films = [film for film in manifest.films if film.split == split]
        films.sort(key=lambda film: (hashlib.sha256(film.path.encode("utf-8", "surrogateescape")).digest(), film.id))
        count = -(-len(films) // per_shard)
        for number in range(count):
            part = films[len(films) * number // count : len(films) * (number + 1) // count]
            found.append((store.shard_name(settings.name, split, number, count), part))
    return found


def pending(work: Path) -> list[dict]:
    """Shards of the plan that are not done."""
    shards = json.loads((work / "plan.json").read_text())["shards"]
    return [shard for shard in shards if not (work / "done" / shard["shard"]).exists()]


def write_shard(work: str, shard: str, count: Callable[[int], None] = lambda films: None) -> str:
    """Read, map and write the films of one shard; count(1) is called after each. Safe to repeat.

    Raises OSError (disk full, folder gone); films that cannot be read are rejects, not errors.
    """
    from array_record.python import array_record_module

    settings = json.loads((Path(work) / "plan.json").read_text())
    kinds = {"str": str, "float": float}
    more = {name: kinds[kind] for name, kind in settings["more"].items()}
    serialize = store.serializer(store.features(settings["labels"], settings["masks"], more))
    target, rows, rejects = Path(settings["target"]) / shard, [], []
    histogram = np.zeros(256, np.int64)
    with renamed(target) as path, _write_errors():
        writer = array_record_module.ArrayRecordWriter(path, store.ENCODINGS[settings["encoding"]])
        with open(Path(work) / shard, encoding="utf-8") as lines, contextlib.closing(writer):
            for line in lines:
                film = Film(*json.loads(line))
                try:
                    example = _example(film, settings)
                except (images.ImageError, shapes.ShapeError) as error:
                    rejects.append([film.path, str(error)])
                else:
                    writer.write(serialize(example))
                    histogram += np.bincount(example["image"].ravel(), minlength=256)
                    rows.append(_row(film, example, settings))
                count(1)
    done = {"rows": rows, "rejects": rejects, "histogram": histogram.tolist(), "bytes": target.stat().st_size}
    write_whole(Path(work) / "done" / shard, json.dumps(done).encode())
    return shard


@contextlib.contextmanager
def _write_errors():
    """ArrayRecord says RuntimeError where a disk is full."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"a shard cannot be written: {str(error).partition(';')[0]}") from None


def _example(film: Film, settings: dict) -> dict:
    """What a record holds: the whitelist and nothing else."""
    source = Path(settings["raw_dir"]) / film.path
    grey = images.read(source, settings["mode"])
    if film.negative:
        grey = 255 - grey
    hashed = hashlib.sha256(str(grey.shape).encode() + grey.tobytes()).hexdigest()[:16]
    stored = images.resize_short_side(grey, settings["size"])
    example = {
        "image": stored[..., None], "id": film.id or hashed, "patient": film.patient, "study": film.study,
        "view": film.view, "projection": film.projection, "sex": film.sex, "age": film.age, "pretrain": film.pretrain,
        "original_height": grey.shape[0], "original_width": grey.shape[1], "pixels": hashed,
    }  # fmt: skip
    if settings["labels"]:
        example["labels"] = np.array(film.labels, np.float32)
    if settings["masks"]:
        example["masks"] = np.stack([_mask(shape, grey.shape, stored.shape) for shape in film.masks], axis=-1)
    return example | dict(zip(settings["more"], film.more, strict=True))


def _mask(shape, original: tuple[int, int], stored: tuple[int, int]) -> np.ndarray:
    if shape is None:
        return np.full(stored, shapes.IGNORE, np.uint8)
    return shapes.resized(shapes.draw(shape, *original), *stored)


def _row(film: Film, example: dict, settings: dict) -> dict:
    """The film's line in films.parquet."""
    height, width, _ = example["image"].shape
    row = {name: example[name] for name in store.IN_RECORDS} | {"split": film.split, "height": height, "width": width}
    row |= {name: example[name] for name in settings["more"]}
    return row | dict(zip(settings["labels"], film.labels, strict=True))


@contextlib.contextmanager
def renamed(path: Path):
    """A temporary name beside `path`, on disk and renamed when the block ends well, removed when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield str(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there as a whole or not at all."""
    with renamed(path) as temporary:
        Path(temporary).write_bytes(data)
