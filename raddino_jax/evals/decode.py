"""Reports of a split, written by a model that is done learning: batch after batch, to reports.jsonl.

All prompts have the same length, so batches need no padding, and their order is that of the pairs. A file that was cut
short, by whatever, is gone on with. films/ keeps the first films, for `gallery`.
"""

import json
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from raddino_jax import hosts, logs, loop, sharding
from raddino_jax.evals import tune
from raddino_jax.evals.picture import Picture, panels
from raddino_jax.models.ops import products

WHOLE, PART = "reports.jsonl", "reports.part.jsonl"
FILMS, SHOWN, SIDE = "films", 8, 512  # folder of the films that a gallery shows, how many, pixels of their longer side
COLUMNS, CELL, LETTERS = 4, 3.0, 44  # films side by side, inches of each, letters of a line under it


def run(task, params: dict, workdir: Path, beat: Callable[[int, str], None] = lambda step, doing: None) -> bool:
    """reports.jsonl of `task.tested`; False when asked to stop before.

    Of several processes all call it, and process 0 writes.
    task: `report.Task`. params: as it trains them. beat(reports so far, what is done now) is called at every batch.
    """
    with loop.Terminated() as stop:
        written = _run(task, params, workdir, beat, stop)
    if not written:
        logs.say(f"asked to end: {workdir / PART} is kept; the same command continues")
    elif hosts.index() == 0:
        _keep_films(task, workdir / FILMS)
        (workdir / PART).replace(workdir / WHOLE)
    return written


def _run(task, params, workdir, beat, stop: loop.Terminated) -> bool:
    part, places = workdir / PART, task.tested
    done = hosts.first("reports", lambda: _keep_sound(part, [task.source.pairs[place].id for place in places]))
    if done:
        logs.say(f"{part}: goes on after {done} reports")
    left, size, began = places[done:], task.config.decode_batch, time.perf_counter()
    starts = range(0, len(left), size)
    batches = (np.resize(left[start : start + size], size) for start in starts)  # one shape, one compilation
    for batch, (start, texts) in enumerate(zip(starts, answers(task, params, batches), strict=True), 1):
        here = left[start : start + size]
        if hosts.index() == 0:
            _append(part, [_line(task, place, text) for place, text in zip(here, texts, strict=False)])
        count, total = done + start + len(here), len(places)
        beat(count, "writing")
        rate = (start + len(here)) / (time.perf_counter() - began)
        logs.say(f"report {count}/{total}, {rate:.2f}/s, eta {logs.duration((total - count) / rate)}")
        if count < total and hosts.ends_at(batch, bool(stop)):
            return False
    return True


def answers(task, params: dict, batches: Iterator[Sequence[int]]) -> Iterator[list[str]]:
    """Texts for batches of places, each of `config.decode_batch`."""
    config, mesh = task.config, tune.mesh_of(task.config)
    eye, writer = task.eye_for(config.decode_dtype), task.writer(config.decode_dtype)
    params = sharding.place(task.merged(params), mesh)
    frozen = {} if eye is None else sharding.place(eye.frozen, mesh)
    tokens = np.tile(np.int32(task.prompt), (config.decode_batch, 1))
    asked = _rows((tokens, np.ones(tokens.shape, bool)), mesh)

    def written(params, frozen, shown, tokens, mask):
        features = shown["features"] if eye is None else eye(frozen, shown["images"])
        return writer.write(params, features, tokens, mask, config.new_tokens)

    write = jax.jit(written, out_shardings=NamedSharding(mesh, P()))
    for _, shown in task.seen(batches):
        with jax.set_mesh(mesh), products(config.decode_dtype):
            found = np.asarray(write(params, frozen, _rows(shown, mesh), *asked))
        yield [task.tokenizer.decode(row) for row in found]


def read(workdir: Path) -> list[dict]:
    """The lines of a whole reports.jsonl."""
    return [json.loads(line) for line in (Path(workdir) / WHOLE).read_text().splitlines()]


def gallery(workdir: Path) -> Picture | None:
    """The first films, what was to be written of them and what is; None where the workdir has no reports of films."""
    paths = sorted((Path(workdir) / FILMS).glob("*.png"))
    if not paths or not (Path(workdir) / WHOLE).exists():
        return None
    lines = read(workdir)[: len(paths)]
    rows = -(-len(paths) // COLUMNS)
    figure, axes = panels(rows, min(len(paths), COLUMNS), CELL, CELL * 1.5)
    for axis in axes.ravel():
        axis.axis("off")
    for axis, path, line in zip(axes.flat, paths, lines, strict=False):
        axis.imshow(Image.open(path), cmap="gray", vmin=0, vmax=255)
        height = -0.03
        for name, colour in (("reference", "#3f8f4f"), ("prediction", "#a8324a")):
            text = textwrap.fill(line[name], LETTERS, max_lines=5, placeholder=" ...")
            axis.text(
                0, height, text, transform=axis.transAxes, va="top", fontsize=8, color=colour,
                parse_math=False,  # a model may write dollar signs
            )  # fmt: skip
            height -= 0.05 * (1 + text.count("\n")) + 0.03
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.12, wspace=0.06, hspace=0.02)
    numbers = [dict(film=line["id"], reference=line["reference"], prediction=line["prediction"]) for line in lines]
    sentence = "Green: the report to be written (with shuffled images: of another film). Red: what the model writes."
    return Picture("reports", "Reports of test films", sentence, figure, numbers)


def _keep_films(task, folder: Path) -> None:
    """The films that the first reports were written for, made small."""
    folder.mkdir(exist_ok=True)
    for number, place in enumerate(task.tested[:SHOWN]):
        film = Image.fromarray(task.source.film(int(task.shown[place])))
        film.thumbnail((SIDE, SIDE))
        film.save(folder / f"{number}.png")


def _line(task, place: int, text: str) -> dict:
    pair = task.source.pairs[place]
    strata = {column: str(pair.facts.get(column, "")) for column in task.config.strata}
    return {"id": pair.id, "reference": pair.text, "prediction": text} | strata


def _keep_sound(path: Path, ids: Sequence[str]) -> int:
    """How many reports a file has, its unfinished last line taken out; none where they are of other films."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # killed inside this line
    if [line["id"] for line in lines] != list(ids[: len(lines)]):
        lines = []
    logs.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def _append(path: Path, lines: Sequence[dict]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _rows(tree, mesh):
    """Rows that every process has, split over a mesh where its size divides them."""
    split, everywhere = sharding.batch_sharding(mesh), NamedSharding(mesh, P())

    def one(rows: np.ndarray) -> jax.Array:
        place = everywhere if len(rows) % mesh.size else split
        return jax.make_array_from_callback(rows.shape, place, lambda index: rows[index])

    return jax.tree.map(one, tree)
