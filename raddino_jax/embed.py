"""Features of a folder of films: python -m raddino_jax.embed --encoder=NAME_OR_PATH --images=DIR_OR_CSV --out=FILE.

    python -m raddino_jax.embed --encoder=rad_dino --images=films/ --out=films.parquet
    python -m raddino_jax.embed --encoder=chexzero --weights=best.pt --images=list.csv --out=films.npz --patches=mean

FILE.npz or FILE.parquet gets `id` (path below --images, with suffix), `cls` [n, D] and, with --patches=mean, `patches`
[n, D]. --patches=full writes all patch features beside it, FILE.patches.npy [n, h, w, D], to be opened with
mmap_mode="r". Files that are no film, or a damaged one, are listed in rejects.csv beside FILE. The same command
continues where it was interrupted.

In a notebook:

    from raddino_jax import embed
    table = embed.embed("rad_dino", "films/")
    table["id"], table["cls"]
"""

import argparse
import collections
import csv
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from raddino_jax import encoders
from raddino_jax.data import images

PATCHES = ("", "mean", "full")
COLUMNS = ("path", "image_path", "file", "filename")  # of a CSV, where --column does not say


class EmbedError(ValueError):
    """A command that cannot run; the message is for a person."""


@dataclass(frozen=True)
class Film:
    """A file to embed. id: how the output names it."""

    id: str
    path: Path


@dataclass
class Batch:
    """Consecutive films: those that could be read, and why the others could not. seen: films up to its end."""

    seen: int
    ids: list[str] = field(default_factory=list)
    squares: list[np.ndarray] = field(default_factory=list)
    rejects: list[dict] = field(default_factory=list)


# --- which films --------------------------------------------------------------------------------------------


def listing(source: str | Path, column: str = "", without: Sequence[Path] = ()) -> list[Film]:
    """Every file of a folder, or those that a CSV (by one column) or a text file (one per line) names; or one film.

    without: files and folders to leave out, such as the output's. Raises EmbedError where there is nothing.
    """
    source = Path(source)
    if source.is_dir():
        films = _below(source, {path.resolve() for path in without})
    elif not source.is_file():
        raise EmbedError(
            f"{source} is not there; expected a folder, a CSV or a text file with one path per line"
        )
    elif images.is_candidate(source):
        films = [Film(source.name, source)]
    else:
        names = _column(source, column) if source.suffix.lower() == ".csv" else source.read_text().splitlines()
        films = [Film(name, source.parent / name) for name in names if name.strip()]
    if not films:
        raise EmbedError(f"{source} holds no files")
    return films


def _below(root: Path, without: set[Path]) -> list[Film]:
    films = []
    for folder, folders, names in os.walk(root):
        here, real = Path(folder), Path(folder).resolve()
        folders[:] = [name for name in folders if real / name not in without]
        paths = [here / name for name in names if real / name not in without]
        films += [Film(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(films, key=lambda film: film.id)


def _column(table: Path, column: str) -> list[str]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        known = rows.fieldnames or []
        name = column or next((c for c in COLUMNS if c in known), "")
        if name not in known:
            raise EmbedError(
                f"{table} has no column named {column or ' or '.join(COLUMNS)}: name one of its own with --column "
                f"({', '.join(known)})"
            )
        return [row[name] or "" for row in rows]


# --- films to batches ---------------------------------------------------------------------------------------


def batches(films: Sequence[Film], read: Callable, size: int, threads: int, start: int = 0) -> Iterator[Batch]:
    """Batches of `size` readable films in order, decoded ahead. read: path -> array, or raises ImageError."""

    def attempt(film: Film):
        try:
            return read(film.path)
        except images.ImageError as error:
            return {"id": film.id, "reason": type(error).__name__, "message": str(error)}

    with ThreadPoolExecutor(threads) as pool:
        batch = Batch(start)
        for film, result in zip(
            films[start:], _ahead(pool, attempt, films[start:], 2 * size + threads), strict=True
        ):
            batch.seen += 1
            if isinstance(result, dict):
                batch.rejects.append(result)
            else:
                batch.ids.append(film.id)
                batch.squares.append(result)
            if len(batch.ids) == size:
                yield batch
                batch = Batch(batch.seen)
        if batch.ids or batch.rejects:
            yield batch


def _ahead(pool: ThreadPoolExecutor, function: Callable, items: Sequence, ahead: int) -> Iterator:
    """map(function, items) in order, at most `ahead` items in the making."""
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


# --- what is finished so far --------------------------------------------------------------------------------


class Work:
    """A folder with the rows finished so far; a killed run loses at most the batch it was in.

    Numbers are appended to plain files, then one line of progress.jsonl says how far they count.
    """

    def __init__(self, folder: Path, settings: dict):
        """Raises EmbedError where the folder holds the work of another command."""
        self.folder, self.ids, self.rejects, self.seen = folder, [], [], 0
        folder.mkdir(parents=True, exist_ok=True)
        stated = folder / "settings.json"
        if stated.exists():
            _refuse_other(json.loads(stated.read_text()), settings, folder)
            self._read_progress()
        else:
            stated.write_text(json.dumps(settings))
        self.progress = (folder / "progress.jsonl").open("a")

    def _read_progress(self) -> None:
        path, whole = self.folder / "progress.jsonl", 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b"\n"):
                break  # killed inside this line
            row, whole = json.loads(line), whole + len(line)
            self.ids, self.rejects, self.seen = (
                self.ids + row["ids"],
                self.rejects + row["rejects"],
                row["seen"],
            )
        if path.exists():
            os.truncate(path, whole)

    def append(self, batch: Batch, arrays: dict[str, np.ndarray]) -> None:
        """Add the rows of a batch: {name: [n, ...]}."""
        for name, value in arrays.items():
            _append(self.folder / f"{name}.npy", len(self.ids), value)
        self.progress.write(json.dumps({"seen": batch.seen, "ids": batch.ids, "rejects": batch.rejects}) + "\n")
        self.progress.flush()
        os.fsync(self.progress.fileno())
        self.ids, self.rejects, self.seen = self.ids + batch.ids, self.rejects + batch.rejects, batch.seen

    def array(self, name: str) -> np.ndarray:
        """The rows so far, on disk rather than in memory."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")[: len(self.ids)]

    def close(self) -> None:
        self.progress.close()


def _append(path: Path, rows: int, value: np.ndarray) -> None:
    """Write rows behind the first `rows` of an .npy file; what an interrupted write left there is written over."""
    header = io.BytesIO()
    shape = (rows + len(value), *value.shape[1:])
    # NumPy leaves room for the first number of the shape to grow, so the header keeps its length.
    np.lib.format.write_array_header_1_0(
        header, np.lib.format.header_data_from_array_1_0(value) | {"shape": shape}
    )
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(header.getvalue())
        file.seek(rows * value.itemsize * math.prod(value.shape[1:]), os.SEEK_CUR)
        file.write(np.ascontiguousarray(value).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _refuse_other(old: dict, new: dict, where: Path) -> None:
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise EmbedError(
            f"{where} is from another command ({'; '.join(changed)}); give another --out, or delete it to start anew"
        )


# --- the command ----------------------------------------------------------------------------------------------


def embed(
    encoder: encoders.Encoder | str,
    source: str | Path,
    out: str | Path = "",
    *,
    weights: str = "",
    patches: str = "",
    batch_size: int = 32,
    dtype: str = "float32",
    mode: str = "raddino",
    column: str = "",
    threads: int = 0,
) -> dict:
    """Features of the films of a folder or list; with `out`, into that file (see the module's docstring).

    encoder, weights, dtype: as encoders.load. mode: how films become 8 bits (data.images.read). threads: that
      decode, 0 for as many as there are cores, up to 16.
    Returns {"id", "cls" [n, D], "rejects"[, "patches"], "seconds", "done_before"}.
    Raises EmbedError, or encoders.WeightsError, with what to do.
    """
    if patches not in PATCHES or mode not in images.MODES or batch_size < 1:
        raise EmbedError(f"patches is one of {PATCHES}, mode one of {images.MODES}, batch_size at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(out or Path(scratch) / "films.npz")
        if out.suffix not in WRITERS:
            raise EmbedError(f"{out}: expected a name that ends in {' or '.join(WRITERS)}")
        unfinished = out.with_name(f".{out.name}.unfinished")
        films = listing(
            source, column, without=[out, unfinished, out.with_name("rejects.csv"), patches_file(out)]
        )
        if isinstance(encoder, str):
            encoder = encoders.load(encoder, weights, dtype)
        settings = _settings(encoder, films, source, patches, mode)
        if out.exists():
            _refuse_other(_meta(out) | {"rejects": None}, settings | {"rejects": None}, out)
            return _table(out, patches, done_before=len(films))
        work = Work(unfinished, settings)
        done_before, start = work.seen, time.perf_counter()
        threads = threads or min(os.cpu_count() or 1, 16)
        _fill(work, encoder, films, patches, min(batch_size, len(films)), mode, threads)
        work.close()
        _finish(work, out, patches, settings)
        shutil.rmtree(unfinished)
        seconds = time.perf_counter() - start
        return _table(out, patches, done_before, seconds) if work.ids else _nothing(work, seconds)


def _settings(encoder: encoders.Encoder, films: Sequence[Film], source, patches: str, mode: str) -> dict:
    """What the rows depend on, weights and list of films included."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(encoder.params):
        digest.update(np.asarray(leaf).tobytes())
    names = hashlib.sha256("\n".join(film.id for film in films).encode())
    return {
        "encoder": encoder.name,
        "weights": digest.hexdigest()[:16],
        "dtype": encoder.dtype,
        "feature": encoder.feature,
        "images": str(source),
        "films": len(films),
        "list": names.hexdigest()[:16],
        "mode": mode,
        "patches": patches,
    }


def _fill(work: Work, encoder, films, patches: str, batch_size: int, mode: str, threads: int) -> None:
    """Embed what is left. One batch is on the device while the next is decoded and the last one written."""

    def read(path: Path) -> np.ndarray:
        return encoder.preprocess([images.read(path, mode)])[0]

    running: tuple[Batch, dict] | None = None
    with tqdm(total=len(films), initial=work.seen, unit="film", file=sys.stderr, smoothing=0.05) as bar:

        def write(batch: Batch, features: dict) -> None:
            work.append(batch, {name: np.asarray(value)[: len(batch.ids)] for name, value in features.items()})
            bar.set_postfix(rejected=len(work.rejects), refresh=False)
            bar.update(work.seen - bar.n)

        for batch in batches(films, read, batch_size, threads, work.seen):
            started = batch, _features(encoder, batch.squares, batch_size, patches)
            if running:
                write(*running)
            running = started
        if running:
            write(*running)


def _features(encoder, squares: list[np.ndarray], size: int, patches: str) -> dict:
    """Features of a batch, started but not awaited. Short batches are padded: one shape, one compiled program."""
    blank = np.zeros((encoder.image_size, encoder.image_size, 1), np.float32)
    out = encoder(np.stack(squares + [blank] * (size - len(squares))))
    if patches == "mean":
        return {"cls": out["cls"], "patches": out["patches"].mean((1, 2))}
    return {"cls": out["cls"]} | ({"patches": out["patches"]} if patches == "full" else {})


def _finish(work: Work, out: Path, patches: str, settings: dict) -> None:
    """The files a person asked for, each under its name only when it is whole; `out` last."""
    rejects = work.folder / "rejects.csv"
    with rejects.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "reason", "message"])
        writer.writeheader()
        writer.writerows(work.rejects)
    os.replace(rejects, out.with_name("rejects.csv"))
    if not work.ids:
        return
    columns = {name: work.array(name) for name in ("cls", "patches")[: 2 if patches == "mean" else 1]}
    # The rejects once more: the next command with an output in this folder writes a rejects.csv of its own.
    meta = json.dumps(settings | {"rejects": work.rejects})
    WRITERS[out.suffix](work.folder / out.name, work.ids, columns, meta)
    if patches == "full" and (work.folder / "patches.npy").exists():  # not so if killed after the next line
        _append(work.folder / "patches.npy", len(work.ids), work.array("patches")[:0])
        os.replace(work.folder / "patches.npy", patches_file(out))
    os.replace(work.folder / out.name, out)


def patches_file(out: Path) -> Path:
    """Where --patches=full writes: films.npz -> films.patches.npy."""
    return out.with_suffix(".patches.npy")


def _write_npz(path: Path, ids: list[str], columns: dict[str, np.ndarray], meta: str) -> None:
    np.savez(path, id=np.array(ids), meta=np.array(meta), **columns)


def _write_parquet(path: Path, ids: list[str], columns: dict[str, np.ndarray], meta: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def rows(values: np.ndarray):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    table = pa.table({"id": ids} | {name: rows(values) for name, values in columns.items()})
    parquet.write_table(table.replace_schema_metadata({"raddino_jax": meta}), path)


WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}


def _read(out: Path) -> tuple[dict, str]:
    if out.suffix == ".npz":
        with np.load(out) as archive:
            return {name: archive[name] for name in archive.files if name != "meta"}, str(archive["meta"])
    from pyarrow import parquet

    table = parquet.read_table(out)
    numbers = {
        name: table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        for name in table.column_names
        if name != "id"
    }
    return {"id": np.array(table["id"].to_pylist())} | numbers, (table.schema.metadata or {})[
        b"raddino_jax"
    ].decode()


def _meta(out: Path) -> dict:
    try:
        return json.loads(_read(out)[1])
    except Exception as error:  # whatever the readers meet in a file that is not ours
        raise EmbedError(f"{out} is there already, and not from this command; give another --out") from error


def _table(out: Path, patches: str, done_before: int, seconds: float = 0.0) -> dict:
    table, meta = _read(out)
    if patches == "full":
        table["patches"] = np.load(patches_file(out), mmap_mode="r")
    return table | {"rejects": json.loads(meta)["rejects"], "done_before": done_before, "seconds": seconds}


def _nothing(work: Work, seconds: float) -> dict:
    return {
        "id": np.array([]),
        "cls": np.zeros((0, 0)),
        "rejects": work.rejects,
        "done_before": 0,
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> int:
    """0 when at least one film could be read, 1 when none could, 2 for a command that cannot run, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m raddino_jax.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--encoder", required=True, help=f"{', '.join(encoders.ENCODERS)}, or a path")
    parser.add_argument("--weights", default="", help="weights of a named encoder; 'random' for none")
    parser.add_argument(
        "--images", required=True, help="a folder, a CSV, a text file with one path per line, or a film"
    )
    parser.add_argument("--out", required=True, help="FILE.npz or FILE.parquet")
    parser.add_argument("--patches", default="", choices=PATCHES)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--mode", default="raddino", choices=images.MODES, help="how films become 8 bits")
    parser.add_argument(
        "--column", default="", help=f"column of a CSV with the paths; default {' or '.join(COLUMNS)}"
    )
    parser.add_argument("--threads", type=int, default=0, help="that decode; 0: one per core, at most 16")
    options = vars(parser.parse_args(argv))
    logging.set_verbosity(logging.ERROR)  # Orbax describes every file it touches
    name, source, out = (options.pop(key) for key in ("encoder", "images", "out"))
    try:
        encoder = encoders.load(name, options.pop("weights"), options.pop("dtype"))
        for note in encoder.notes:
            print(f"{name}: {note}", file=sys.stderr)
        table = embed(encoder, source, out, **options)
    except (EmbedError, encoders.WeightsError, OSError) as error:
        print(f"raddino_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("raddino_jax: interrupted; the same command continues from here", file=sys.stderr)
        return 130
    rows, rejected = len(table["id"]), len(table["rejects"])
    done = rows + rejected - table["done_before"]
    rate = round(done / table["seconds"], 2) if table["seconds"] and done else None
    if not rows:
        print(
            f"raddino_jax: none of {rejected} files is a film that can be read; rejects.csv says why",
            file=sys.stderr,
        )
    seconds = round(table["seconds"], 1)
    print(json.dumps(dict(out=out, rows=rows, rejected=rejected, images_per_second=rate, seconds=seconds)))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
