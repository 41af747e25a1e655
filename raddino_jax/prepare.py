"""A dataset as distributed, or any folder of films -> a TFDS dataset that training reads without decoding.

    python -m raddino_jax.prepare --dataset=NAME --raw_dir=DIR --data_dir=DIR [--name=NAME] [--workers=N]

--dry_run inspects and reports only. Options of a dataset (`--dataset=NAME --help`) are given as --option=value. Killed
at any moment, the same command goes on where it was. The report goes to stderr, one JSON object to stdout.
"""

import argparse
import collections
import concurrent.futures
import fcntl
import inspect
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path

from tqdm import tqdm

from raddino_jax.data import images, shards, store, summary
from raddino_jax.data.datasets import (
    brax,
    candid_ptx,
    chest_imagenome,
    chestx_ray14,
    chexpert,
    folder,
    iu_xray,
    manifest,
    mimic_cxr,
    mimic_iv,
    mimic_lungs,
    padchest,
    rsna_pneumonia,
    vindr_cxr,
    vindr_ribcxr,
)
from raddino_jax.data.datasets.manifest import Manifest, ManifestError

DATASETS = {
    "folder": folder, "brax": brax, "chexpert": chexpert, "mimic_cxr": mimic_cxr, "chestx_ray14": chestx_ray14,
    "padchest": padchest, "vindr_cxr": vindr_cxr, "candid_ptx": candid_ptx, "rsna_pneumonia": rsna_pneumonia,
    "mimic_lungs": mimic_lungs, "chest_imagenome": chest_imagenome, "vindr_ribcxr": vindr_ribcxr, "iu_xray": iu_xray,
    "mimic_iv": mimic_iv,
}  # fmt: skip


def prepare(
    dataset: str, raw_dir: str, data_dir: str, *, name: str = "", size: int = 518, mode: str = "raddino",
    encoding: str = "raw", shard_mib: float = 128, workers: int = 0, exclude: str = "", dry_run: bool = False,
    beam_runner: str = "", beam_options: str = "", **options,
) -> dict:  # fmt: skip
    """Prepare `dataset` below `data_dir` and return what summary.json holds.

    name: of the result, default `dataset`. size: short side in pixels. mode: how films become 8 bits (`images.read`).
    encoding: of `store.ENCODINGS`. shard_mib: size of the result's files. workers: processes, 0 for one per core.
    exclude: file that lists ids, patients or studies to leave out. beam_runner: run the shards on Apache Beam, e.g.
    DirectRunner. options: of the dataset.
    Raises ManifestError for a raw tree, option or target that cannot be used.
    """
    name = name or dataset
    _check(dataset, raw_dir, data_dir, name, size, mode, encoding, options)
    settings = shards.Settings(dataset, name, str(Path(raw_dir).resolve()), size, mode, encoding, shard_mib)
    found, licence = DATASETS[dataset].read(Path(raw_dir), **options), DATASETS[dataset].LICENCE
    _exclude(found, exclude)
    _pseudonyms(found)
    if not found.films:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in found.rejects[:5])
        raise ManifestError(f"no film of {dataset} in {raw_dir}: nothing to prepare{reasons}")
    left_out = sum(found.dropped.values())
    say(f"{dataset}: {len(found.films):,} films, {len(found.rejects):,} rejected, {left_out:,} left out")
    for note in found.notes:
        say(f"note: {note}")
    if dry_run:
        seen = summary.inspect(found, settings, licence)
        for path, reason in seen.pop("first_rejects"):
            say(f"reject: {path}: {reason}")
        return seen
    home = Path(data_dir) / name
    target, work = home / store.VERSION, home / "work"
    with _alone(home):
        target.mkdir(exist_ok=True)
        if store.is_prepared(data_dir, name):
            result = _finished(found, settings, home)
        else:
            _sweep(target, work)
            total = shards.plan(found, settings, target, work)
            about = summary.report(found, settings, licence)
            del found
            _write(total, work, workers or os.cpu_count(), beam_runner, beam_options)
            result = summary.finish(home, work, about)
        shutil.rmtree(work, ignore_errors=True)
    say(f"{result['films']:,} films in {target}, mean {result['mean']}, std {result['std']}")
    return result


def _check(dataset, raw_dir, data_dir, name, size, mode, encoding, options) -> None:
    """Everything that can be wrong before a file is read."""
    if dataset not in DATASETS:
        raise ManifestError(f"dataset {dataset!r} must be one of {', '.join(DATASETS)}")
    if not Path(raw_dir).is_dir():
        raise ManifestError(f"--raw_dir={raw_dir} is no folder. {dataset}: {DATASETS[dataset].OBTAIN}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ManifestError(f"--name={name}: expected lower-case letters, digits and _, beginning with a letter")
    if Path(raw_dir).resolve() in (Path(data_dir).resolve(), *Path(data_dir).resolve().parents):
        raise ManifestError(f"--data_dir={data_dir} lies inside --raw_dir: give a folder outside the archive")
    if mode not in images.MODES or encoding not in store.ENCODINGS or not 8 <= size <= 4096:
        raise ManifestError(
            f"expected --mode of {', '.join(images.MODES)}, --encoding of {', '.join(store.ENCODINGS)} and --size "
            f"between 8 and 4096; found {mode}, {encoding}, {size}"
        )
    known = _options(dataset)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ManifestError(f"{dataset} has no option --{unknown[0]}; it has {', '.join(f'--{o}' for o in known)}")


def _options(dataset: str) -> dict:
    """Names and defaults of what a dataset's `read` may be told."""
    parameters = inspect.signature(DATASETS[dataset].read).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _exclude(found: Manifest, path: str) -> None:
    """Leave out films whose id, patient, study or path a file lists."""
    if not path:
        return
    listed = manifest.listed(path)
    keep = [
        film for film in found.films
        if listed.isdisjoint((film.id, film.patient, film.study, film.path, Path(film.path).stem) if film.id else
                             (film.patient, film.study, film.path, Path(film.path).stem))
    ]  # fmt: skip
    found.dropped[f"listed in {Path(path).name}"] = len(found.films) - len(keep)
    found.films = keep


def _pseudonyms(found: Manifest) -> None:
    """Patients of a private folder by number, in an order that says nothing; studies within their patient."""
    if not found.pseudonyms:
        return
    patients = sorted({film.patient for film in found.films}, key=manifest.share)
    numbers = {name: f"p{index:06d}" for index, name in enumerate(patients)}
    studies: dict[tuple, dict] = collections.defaultdict(dict)
    for film in found.films:
        of_patient = studies[film.patient]
        film.study = f"s{of_patient.setdefault(film.study, len(of_patient)):03d}" if film.study else ""
        film.patient = numbers[film.patient]


# --- writing ---------------------------------------------------------------------------------------------


class _alone:
    """One process per target at a time; the lock dies with its holder."""

    def __init__(self, home: Path):
        home.mkdir(parents=True, exist_ok=True)
        self.path = home / ".lock"

    def __enter__(self):
        self.file = open(self.path, "w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ManifestError(f"{self.path.parent} is being prepared by another process: wait for it") from None

    def __exit__(self, *_):
        self.path.unlink(missing_ok=True)
        self.file.close()


def _sweep(target: Path, work: Path) -> None:
    """Remove what a killed process left under temporary names."""
    for place in (target, work, work / "done"):
        for path in place.glob(".*.tmp") if place.exists() else ():
            path.unlink()
    shutil.rmtree(target / ".metadata", ignore_errors=True)


def _write(total: list[dict], work: Path, workers: int, beam_runner: str, beam_options: str) -> None:
    todo = [shard["shard"] for shard in shards.pending(work)]
    films = sum(shard["films"] for shard in total)
    done = films - sum(shard["films"] for shard in shards.pending(work))
    if done:
        say(f"going on: {done:,} of {films:,} films are done")
    if beam_runner:
        _on_beam(todo, work, beam_runner, beam_options)
    else:
        with tqdm(total=films, initial=done, unit="film", file=sys.stderr, smoothing=0.05) as bar:
            _in_processes(todo, work, min(workers, len(todo)), bar)


def _in_processes(todo: list[str], work: Path, workers: int, bar) -> None:
    if workers <= 1:
        for shard in todo:
            shards.write_shard(str(work), shard, bar.update)
        return
    context = multiprocessing.get_context("spawn")  # decoders hold threads, which do not survive a fork
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (counter,))
    waiting = {pool.submit(_write_counted, str(work), shard) for shard in todo}
    try:
        while waiting:
            ready, waiting = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
            bar.update(counter.value - bar.n + bar.initial)
            for future in ready:
                future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ManifestError(
            "a worker process died, most likely for want of memory: the finished shards are kept, start the same "
            "command with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()) if waiting else ():
            process.kill()


def _begin_worker(counter) -> None:
    """A worker ends with its parent: after kill -9 nobody else would tell it."""
    global _counter
    _counter = counter
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([parent]), os._exit(1)), daemon=True).start()


def _write_counted(work: str, shard: str) -> str:
    def count(films: int) -> None:
        with _counter.get_lock():
            _counter.value += films

    return shards.write_shard(work, shard, count)


def _on_beam(todo: list[str], work: Path, runner: str, options: str) -> None:
    """The same shards as elements of a Beam pipeline; its workers must see raw_dir and data_dir."""
    try:
        import apache_beam as beam
    except ImportError:
        raise ManifestError("--beam_runner needs Apache Beam: pip install 'raddino_jax[beam]'") from None
    from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(runner=runner, options=PipelineOptions(options.split())) as pipeline:
        names = pipeline | beam.Create(todo) | beam.Reshuffle()
        names | beam.Map(lambda shard, work: shards.write_shard(work, shard), str(work.resolve()))


def _finished(found: Manifest, settings: shards.Settings, home: Path) -> dict:
    """The summary of a result that is there already, if it is this one."""
    result = json.loads((home / "summary.json").read_text())
    if shards.digest(found, settings) != result["plan"]:
        raise ManifestError(
            f"{home} holds a dataset prepared from other files or with other settings: give another --name, or remove "
            "that folder"
        )
    say(f"{home / store.VERSION} is complete already")
    return result


# --- the command line ------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(argv: list[str] | None) -> dict:
    parser = argparse.ArgumentParser(prog="python -m raddino_jax.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", required=True, help=", ".join(DATASETS))
    parser.add_argument("--raw_dir", required=True, help="the dataset as distributed, unpacked")
    parser.add_argument("--data_dir", default="", help="where prepared datasets live")
    parser.add_argument("--name", default="", help="of the result; default: the dataset's")
    parser.add_argument("--size", type=int, default=518, help="short side in pixels")
    parser.add_argument("--mode", default="raddino", help=f"how films become 8 bits: {', '.join(images.MODES)}")
    parser.add_argument("--encoding", default="raw", help=", ".join(store.ENCODINGS))
    parser.add_argument("--shard_mib", type=float, default=128, help="size of the result's files")
    parser.add_argument("--workers", type=int, default=0, help="processes; default: one per core")
    parser.add_argument("--exclude", default="", help="file that lists ids, patients or studies to leave out")
    parser.add_argument("--dry_run", action="store_true", help="inspect and report only")
    parser.add_argument("--beam_runner", default="", help="e.g. DirectRunner; needs the beam extra")
    parser.add_argument("--beam_options", default="", help="further options of the runner, in one word")
    parser.epilog = "options of the datasets: " + "; ".join(
        f"{name}: {' '.join(f'--{o}={d}' for o, d in _options(name).items()) or 'none'}" for name in DATASETS
    )
    known, rest = parser.parse_known_args(argv)
    given = vars(known)
    if known.dataset in DATASETS:
        for word in rest:
            option, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or not equals:
                parser.error(f"options are written --option=value; found {word}")
            given[option] = type(_options(known.dataset).get(option, ""))(value)
    if not known.data_dir and not known.dry_run:
        parser.error("--data_dir says where the result goes (or --dry_run)")
    return given


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    try:
        result = prepare(**_parse(argv))
    except (ManifestError, store.StoreError) as error:
        say(f"raddino_jax: {error}")
        return 2
    except OSError as error:
        say(f"raddino_jax: {error.strerror or error} ({error.filename or 'writing'}); finished shards are kept")
        return 1
    print(json.dumps(result | {"seconds": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
