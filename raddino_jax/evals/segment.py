"""task=segment: a head learns to draw structures, and Dice of films that nobody trained on says how well.

Recipe and scores: arXiv 2401.10815, E.3.2 and Table 4. Written to the workdir: results.json, cases.csv (each film, each
structure), overlays/ (truth green, prediction red), and with `config.shots` or several seeds curve.csv. Each number of
films and seed has a folder of its own then, with checkpoints, metrics.jsonl and rows.json, and is not run twice.
Letters: n films, C structures, S pixels per side of the square, H W pixels of the film.
"""

import csv
import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from raddino_jax import logs
from raddino_jax.data import cases
from raddino_jax.data.cases import CaseError
from raddino_jax.data.shapes import IGNORE
from raddino_jax.evals import dice, fairness, fit, frames, heads, overlays
from raddino_jax.evals.fit import Films

SIDED = re.compile(r"\b(left|right)\b|^[LR]\d+$", re.IGNORECASE)  # structures that a mirror image gives another name


def run(config, workdir: Path) -> None:
    """Train, judge and write; a finished run prints its results. Raises DataError, encoders.WeightsError."""
    config, workdir = config.copy_and_resolve_references(), Path(workdir)
    check(config)
    if (workdir / "results.json").exists():
        _tell(json.loads((workdir / "results.json").read_text()))
        return
    task = Task.open(config)
    logs.write_whole(workdir / "structures.json", json.dumps(values_of(task.source), indent=1) + "\n")
    found = []
    for shots, seed in plan(config, len(task.parts["train"])):
        folder = workdir if not several(config) else workdir / f"films_{shots}_seed_{seed}"
        done = folder / "rows.json"
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = task.one(shots, seed, folder)
            if rows is None:
                return
            logs.write_whole(done, json.dumps(rows, indent=1) + "\n")
        found.append(json.loads(done.read_text()))
    rows = [row for rows in found for row in rows]
    if several(config):
        rows += _over_seeds(rows)
        _write_curve(workdir / "curve.csv", rows)
    logs.write_whole(workdir / "results.json", json.dumps(rows, indent=1) + "\n")
    _tell(rows)


def check(config) -> None:
    """Raise CaseError with every field that cannot be, and its mend."""
    problems = [
        message for bad, message in (
            (config.head not in heads.HEADS, f"head={config.head!r} must be one of {', '.join(heads.HEADS)}"),
            (not config.dataset, "dataset is empty: lungs, zones, pneumothorax, tubes, ribs, synthetic, folder, "
             "or the name of a prepared dataset, e.g. --config=configs/segment.py:dataset=synthetic"),
            (config.head in heads.DECODERS and not config.encoder, "encoder is empty: name one, or a workdir"),
            (config.fit not in frames.FITS, f"fit={config.fit!r} must be one of {', '.join(frames.FITS)}"),
            (config.batch_size < 1 or config.epochs < 1, "batch_size and epochs must be at least 1"),
            (any(n < 0 for n in config.shots), "shots are numbers of films; 0 stands for all"),
            (config.seeds < 1, "seeds must be at least 1"),
            (config.lr <= 0, f"lr={config.lr} must be positive"),
        ) if bad
    ]
    if problems:
        raise CaseError("this config cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


def several(config) -> bool:
    """Whether a config asks for a curve rather than one run."""
    return bool(config.shots) or config.seeds > 1


def plan(config, films: int) -> list[tuple[int, int]]:
    """(training films, seed) of each run; numbers above what there is are left out."""
    shots = sorted({n or films for n in config.shots or (0,) if n <= films})
    return [(n, config.seed + k) for n in shots for k in range(config.seeds)]


@dataclasses.dataclass(frozen=True)
class Task:
    """A head without weights, films as squares, and where they lie in the films that they are of.

    films: levels or features of all cases; squares: their levels; frames: where each lies; parts: split -> index.
    """

    config: object
    head: heads.Head
    source: object
    films: Films
    squares: np.ndarray
    frames: list[frames.Frame]
    parts: dict[str, np.ndarray]

    @classmethod
    def open(cls, config) -> "Task":
        """Read all films and masks; with a frozen encoder and no augmentation, compute their features once."""
        source = cases.open_cases(config)
        lacking = [column for column in config.strata if column not in source.cases[0].facts]
        if lacking:
            raise CaseError(f"strata: no column {', '.join(lacking)}; there are {', '.join(source.cases[0].facts)}")
        head = heads.build(config, len(source.structures))
        splits = np.array(cases.with_splits(source.cases, config.seed))
        parts = {split: np.flatnonzero(splits == split) for split in cases.SPLITS}
        lacking = [split for split, index in parts.items() if not len(index)]
        if lacking:
            raise CaseError(f"no film of {source.name} is of split {', '.join(lacking)} ({len(splits)} films)")
        logs.say(
            f"data: {source.kind.upper()} ({source.name}: {', '.join(f'{len(i)} {s}' for s, i in parts.items())}; "
            f"{', '.join(source.structures)})"
        )
        squares, masks, seen = _squares(source, head, config.fit)
        films = Films(squares, masks)
        if head.encoder is not None and not config.augment:
            films = Films(_features(head, squares, config), masks, featured=True)
        elif config.augment and config.deformation.flip and any(map(SIDED.search, source.structures)):
            config.deformation.flip = 0.0
            logs.say("no film is flipped: structures have sides")
        return cls(config, head, source, films, squares, seen, parts)

    def one(self, shots: int, seed: int, folder: Path) -> list[dict] | None:
        """Train on so many films and judge on the test part; None when asked to stop."""
        train = np.random.default_rng((seed, 1)).permutation(self.parts["train"])[:shots]
        logs.say(f"{self.config.head} on {len(train)} films, seed {seed}")
        val, test = self.films.take(self.parts["val"]), self.parts["test"]
        best = fit.run(self.config, self.head, self.films.take(train), val, seed, folder)
        if best is None:
            return None
        predict = predictor(self.head, best, self.films, self.config.batch_size)
        judged = self.judge(predict, test)
        mean = mean_mask(self.films.masks[train])
        baseline = self.judge(lambda index: np.broadcast_to(mean, (len(index), *mean.shape)), test)
        self.write_cases(folder / "cases.csv", test, {self.name: judged, "mean mask": baseline})
        self.draw(folder / "overlays", predict, test[: self.config.overlays])
        count = sum(leaf.size for leaf in jax.tree.leaves(best["params"]))
        rows = self.rows(self.name, self.config.head, test, judged, len(train), seed)
        rows += self.rows("mean mask", "none", test, baseline, len(train), seed)
        return [row | {"parameters": count if row["head"] != "none" else 0} for row in rows]

    @property
    def name(self) -> str:
        """The encoder, as rows call it."""
        if self.head.encoder is None:
            return "none"
        return self.config.encoder + (" (random weights)" if self.config.weights == "random" else "")

    def judge(self, predict: Callable, index: np.ndarray) -> dict[str, np.ndarray]:
        """{"dice", "dice_native", "false_share"} [n, C] of predicted logits, in the square and over the film."""
        found = {"dice": [], "dice_native": [], "false_share": []}
        for start in range(0, len(index), self.config.batch_size):
            part = index[start : start + self.config.batch_size]
            for i, logits in zip(part, predict(part), strict=True):
                truth = np.moveaxis(self.films.masks[i], -1, 0)
                found["dice"].append(dice.dice(logits > 0, truth))
                native = self.source.load(i)[1]
                over = frames.over_film(logits, self.frames[i], native.shape[1:]) > 0
                found["dice_native"].append(dice.dice(over, native))
                found["false_share"].append(dice.falsely(over, native))
        return {name: np.stack(values) for name, values in found.items()}

    def rows(self, encoder: str, head: str, index, judged, shots: int, seed: int) -> list[dict]:
        """Rows of results.json: each structure and their mean within films, all films and each stratum."""
        known = [self.source.cases[i] for i in index]
        columns = {
            column: np.array([str(case.facts[column]).strip() for case in known]) for column in self.config.strata
        }
        patients = np.array([case.patient for case in known])
        common = dict(
            task="segment", dataset=self.config.dataset, encoder=encoder, head=head, films=shots, seed=seed,
            folds=1, data=self.source.kind, config="config.json",
        )
        rows = []
        for metric, name, values in _scores(judged, self.source.structures):
            has = ~np.isnan(values)
            if not has.any():
                continue
            here = common | {"metric": metric, "class": name}
            rows.append(here | dice.summary(values, patients))
            rows += [here | row for row in _strata(values[has], columns, has, patients[has])]
        return rows

    def write_cases(self, path: Path, index, by_encoder: dict) -> None:
        """One line per film, structure and encoder."""
        lines = [["id", "patient", "encoder", "structure", "dice", "dice_native", "false_share"]]
        for encoder, judged in by_encoder.items():
            for row, i in enumerate(index):
                case = self.source.cases[i]
                for k, structure in enumerate(self.source.structures):
                    numbers = [_cell(judged[name][row, k]) for name in ("dice", "dice_native", "false_share")]
                    lines.append([case.id, case.patient, encoder, structure, *numbers])
        logs.write_whole(path, "".join(_line(line) for line in lines))

    def draw(self, folder: Path, predict: Callable, index: np.ndarray) -> None:
        """Overlays of some films, at their own size."""
        for i in index:
            film, truth = self.source.load(i)
            over = frames.over_film(predict(np.array([i]))[0], self.frames[i], film.shape) > 0
            overlays.save(folder / f"{cases.bare(Path(self.source.cases[i].id))}.png", film, over, truth == 1)


def values_of(source) -> dict[str, int]:
    """Structure -> value in masks that are written: that of the masks learned from, or 1, 2, ...; 255 for "name>0"."""
    rules = getattr(source, "rules", None)
    if rules is None:
        return {name: value for value, name in enumerate(source.structures, start=1)}
    return {rule.name: rule.values[0] if rule.values else 255 for rule in rules}


def predictor(head: heads.Head, variables: dict, films: Films, batch_size: int) -> Callable:
    """index -> logits [n, C, S, S] of those films."""
    logits = compiled(head, variables, films.featured)

    def predict(index):
        short = batch_size - len(index)  # one shape, one compilation
        padded = np.concatenate([index, np.repeat(index[:1], max(short, 0))])
        return logits(films.inputs[padded])[: len(index)]

    return predict


def compiled(head: heads.Head, variables: dict, featured: bool = False) -> Callable:
    """Levels uint8 [n, S, S], or features -> logits [n, C, S, S]."""
    def logits(variables, frozen, inputs):
        return head.logits(variables, inputs if featured else head.features(frozen, inputs))

    run = jax.jit(logits) if head.encoder is None else head.encoder.compiled(logits)
    return lambda inputs: np.moveaxis(np.asarray(run(variables, head.frozen, inputs)), -1, 1)


def mean_mask(masks: np.ndarray) -> np.ndarray:
    """What most training films show at a place, as logits [C, S, S]: the same guess for every film."""
    known = masks != IGNORE
    share = (masks == 1).sum(0) / np.maximum(known.sum(0), 1)
    return np.moveaxis(share - 0.5, -1, 0).astype(np.float32)


def _squares(source, head, fit: str) -> tuple[np.ndarray, np.ndarray, list]:
    """Levels uint8 [n, S, S], masks uint8 [n, S, S, C] and frames of all cases, read once."""
    n, size = len(source.cases), head.size
    levels = np.empty((n, size, size), np.uint8)
    masks = np.empty((n, size, size, len(source.structures)), np.uint8)
    seen, began, told = [], time.perf_counter(), time.perf_counter()
    for i in range(n):
        film, drawn = source.load(i)
        levels[i], frame = frames.framed(film, head.settings, fit)
        masks[i] = np.moveaxis(frames.in_frame(drawn, frame, size), 0, -1)
        seen.append(frame)
        if time.perf_counter() - told > 10:
            told = time.perf_counter()
            rate = (i + 1) / (told - began)
            logs.say(f"read {i + 1}/{n} films, {rate:.0f}/s, eta {logs.duration((n - i - 1) / rate)}")
    return levels, masks, seen


def _features(head, squares: np.ndarray, config) -> np.ndarray:
    """The frozen encoder's maps of all films [n, L, h, w, D], computed once."""
    side = head.size // head.encoder.patch_size
    shape = (len(squares), head.network.layers, side, side, head.encoder.width)
    gib = np.prod(shape, dtype=float) * 4 / 2**30
    if gib > config.features_gib:
        raise CaseError(
            f"features of {len(squares)} films take {gib:.1f} GiB, config.features_gib allows {config.features_gib:g}: "
            "raise it, or set config.augment=True, which computes them anew in every step"
        )
    features, out = head.encoder.compiled(head.features), np.empty(shape, np.float32)
    began = time.perf_counter()
    for start in range(0, len(squares), config.batch_size):
        part = squares[start : start + config.batch_size]
        short = config.batch_size - len(part)
        padded = np.concatenate([part, np.zeros((short, *part.shape[1:]), np.uint8)])
        out[start : start + len(part)] = np.asarray(features(head.frozen, padded))[: len(part)]
    logs.say(f"features of {len(squares)} films once, in {logs.duration(time.perf_counter() - began)} ({gib:.2f} GiB)")
    return out


def _scores(judged: dict, structures: Sequence[str]):
    """(metric, class, value per film): Dice by structure and within films, and what is predicted where nothing is."""
    for metric in ("dice", "dice_native"):
        for k, name in enumerate(structures):
            yield metric, name, judged[metric][:, k]
        yield metric, "macro", dice.within(judged[metric])
    share = judged["false_share"]
    for k, name in enumerate(structures):
        yield "false_positive_rate", name, np.where(np.isnan(share[:, k]), np.nan, share[:, k] > 0)
        yield "false_positive_share", name, share[:, k]


def _strata(values: np.ndarray, columns: dict, has: np.ndarray, patients: np.ndarray) -> list[dict]:
    """Rows of `fairness.strata` for one value per film, their std that over films, as in all other rows here."""
    groups = {column: of[has] for column, of in columns.items()}
    rows = fairness.strata(fairness.mean_of(values), groups, patients)
    for row in rows:
        column, _, name = row.get("worst", row["stratum"]).partition("=")
        inside = values[groups[column] == name] if name else values
        row["std"] = float(inside.std(ddof=1)) if len(inside) > 1 else None
    return rows


def _over_seeds(rows: list[dict]) -> list[dict]:
    """Means over the seeds of rows that differ in nothing else; std is that between seeds."""
    groups: dict[tuple, list[dict]] = {}
    names = ("encoder", "head", "films", "metric", "class", "stratum")
    for row in rows:
        if row["value"] is not None:
            groups.setdefault(tuple(row.get(name, "") for name in names), []).append(row)
    means = []
    for group in groups.values():
        values = [row["value"] for row in group]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        whole = {k: v for k, v in group[0].items() if k not in ("interval", "worst", "gap")}
        seeds = [row["seed"] for row in group]
        means.append(whole | {"value": float(np.mean(values)), "std": std, "seed": seeds, "folds": len(seeds)})
    return means


def _write_curve(path: Path, rows: list[dict]) -> None:
    """Dice over the number of training films, mean and standard deviation over seeds."""
    names = ("encoder", "head", "films", "class", "value", "std", "folds")
    chosen = [r for r in rows if isinstance(r["seed"], list) and r["metric"] == "dice" and "stratum" not in r]
    lines = [names, *([row[name] for name in names] for row in sorted(chosen, key=lambda r: r["films"]))]
    logs.write_whole(path, "".join(_line(line) for line in lines))


def _line(cells: Sequence) -> str:
    class Text(list):
        write = list.append

    text = Text()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return "".join(text)


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6f}"


def _tell(rows: list[dict]) -> None:
    """One line per Dice of all structures together."""
    for row in rows:
        where = row.get("stratum", "all test films")
        if row["metric"] not in ("dice", "dice_native") or row["class"] != "macro" or where.endswith(": all"):
            continue
        interval, spread = row.get("interval"), row["std"]
        between = " (95 % {:.3f} to {:.3f})".format(*interval) if interval else ""
        logs.say(
            f"segment: {row['encoder']:24s} {row['head']:8s} {row['films']:4d} films  {row['metric']:11s} "
            f"{'undefined' if row['value'] is None else format(row['value'], '.3f')}{between}"
            f"{'' if spread is None else f' std {spread:.3f}'}  {row['n']} films, {where}  [{row['data']}]"
        )
