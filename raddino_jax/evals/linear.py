"""task=probe: a linear layer on a frozen encoder, and a kNN vote beside it, by the protocols of `splits`.

Learning rates are chosen by the validation part of each repeat; its test part is looked at once, by the layer chosen.
Letters: n films, D width, C classes, R repeats.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from raddino_jax import encoders, logs
from raddino_jax.data import labels, pipeline, store
from raddino_jax.data.labels import LabelError, Labels
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import fairness, fast, features, heads, probe, scores, splits, varied
from raddino_jax.models import vit


@dataclass(frozen=True)
class Task:
    """Films, what is known of them, and who is learned from. kind: synthetic or real."""

    config: object
    films: features.Films
    labels: Labels
    splits: list[splits.Split]
    protocol: splits.Protocol
    kind: str
    columns: dict[str, np.ndarray]  # of `config.strata`: the group of each film


def run(config, workdir: Path) -> None:
    """Judge every encoder and write results.json; a finished run prints its results. Raises DataError, LabelError."""
    config, workdir = config.copy_and_resolve_references(), Path(workdir)
    check(config)
    done = _rows_of(workdir)
    if not {_called(config, name) for name in (config.encoder, *config.beside)} - {row["encoder"] for row in done}:
        _tell(done)
        return
    task = open_task(config)
    for name in (config.encoder, *config.beside):
        rows = judge(task, name)
        scores.write_rows(workdir, rows)
        _tell(rows)


def _rows_of(workdir: Path) -> list[dict]:
    path = workdir / "results.json"
    return [row for row in json.loads(path.read_text()) if row["task"] == "probe"] if path.exists() else []


def check(config) -> None:
    """Raise DataError with every field that cannot be, and its mend."""
    problems = [
        message for bad, message in (
            (not config.dataset, f"dataset is empty: {', '.join(splits.PROTOCOLS)}, any prepared dataset, folder or "
             "synthetic, e.g. --config=configs/probe.py:dataset=synthetic"),
            (config.dataset == "folder" and not (config.images and config.csv and config.labels),
             "dataset=folder needs images (where its films are), csv (its table) and labels (columns of 0 and 1)"),
            (config.feature not in vit.FEATURES, f"feature={config.feature!r} must be in {', '.join(vit.FEATURES)}"),
            (config.protocol not in ("", *splits.KINDS), f"protocol={config.protocol!r} must be in {splits.KINDS}"),
            (config.repeats < 0 or (config.protocol == "folds" and config.repeats == 1), "repeats must be at least 2"),
            (not config.lrs or any(lr <= 0 for lr in config.lrs), "lrs must be positive, at least one"),
            (config.batch_size < 1 or config.epochs < 1, "batch_size and epochs must be at least 1"),
        ) if bad
    ]  # fmt: skip
    if problems:
        raise DataError("this config cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


# --- films and labels -----------------------------------------------------------------------------------------


def open_task(config) -> Task:
    """The labelled films of a config and their splits. Raises DataError, LabelError."""
    protocol = splits.protocol_of(config)
    source = _source(config)
    asked = SimpleNamespace(
        csv=config.csv, columns=protocol.labels, file_column=config.file_column, where=protocol.where,
        patient_column=config.patient_column, films=config.films or len(source),
    )  # fmt: skip
    found = source.labels(asked)
    if found is None:
        raise LabelError(f"{config.dataset} has no labels, nothing to probe")
    found = found.take(np.arange(len(found))[: asked.films])
    if protocol.balanced:
        found = dataclasses.replace(found, values=splits.balanced(found.values, config.seed))
        found = found.take(~np.isnan(found.values).all(axis=1))
    cut = splits.splits_of(protocol, found.patients, _official(config, source, found, protocol), config.seed)
    sizes = ", ".join(f"{len(part)} {name}" for name, part in vars(cut[0]).items())
    logs.say(
        f"data: {source.kind.upper()} ({config.dataset}: {len(found)} films of {len(set(found.patients))} patients; "
        f"{protocol.kind}, {len(cut)} repeats, the first of {sizes}; {', '.join(found.names)})"
    )
    columns = {name: np.array(_column(config, source, found, protocol, name)) for name in config.strata}
    return Task(config, features.Films(source, found.films), found, cut, protocol, source.kind, columns)


def _source(config):
    if config.dataset == "synthetic":  # other films than those trained on
        return pipeline.Synthetic(config.data.synthetic_size, config.data.image_size, seed=1)
    name = f"folder:{config.images}" if config.dataset == "folder" else config.dataset
    return pipeline._open(name, config.data, "all")


def _official(config, source, found: Labels, protocol: splits.Protocol) -> Sequence[str] | None:
    """The split that the dataset gives each film, where the protocol asks for it."""
    if protocol.kind != "official":
        return None
    if isinstance(source, store.Prepared) or config.split_column:
        return _column(config, source, found, protocol, config.split_column or "split")
    return None


def _column(config, source, found: Labels, protocol: splits.Protocol, name: str) -> Sequence[str]:
    """What a column says of each film, as words. Raises LabelError where there is no such column."""
    if isinstance(source, pipeline.Folder):
        told = (name, config.file_column, protocol.where)
        return labels.read_column(config.csv, source.files, *told, films=found.films)
    if isinstance(source, store.Prepared):
        known = source.table.column_names
        rows = source.table[name].take(source.films[found.films]).to_pylist() if name in known else ()
    else:
        about = [source.source.labels(int(film)) for film in found.films]
        known, rows = list(about[0]), [one.get(name) for one in about]
    if name not in known:
        raise LabelError(f"{config.dataset} has no column {name!r}; it has {', '.join(known)}")
    return [str(word) for word in rows]


# --- judging --------------------------------------------------------------------------------------------------


def _called(config, name: str) -> str:
    return name + (" (random weights)" if name == config.encoder and config.weights == "random" else "")


def judge(task: Task, name: str) -> list[dict]:
    """Rows of one encoder: auprc and auroc of the layer and of the vote, per class and macro, over the repeats."""
    config, began = task.config, time.perf_counter()
    encoder = name
    if name != "pixels":
        weights = config.weights if name == config.encoder else ""
        encoder = heads.sized(encoders.load(name, weights, config.compute_dtype), config.image_size)
    x = features.cached(
        encoder, task.films, config.feature, config.features_dir, config.encode_batch, config.threads
    )  # fmt: skip
    took = logs.duration(time.perf_counter() - began)
    logs.say(f"features of {name}: {x.shape[1]} numbers a film, in {took}")
    recipe = fast.Recipe(
        tuple(config.lrs), config.epochs, config.batch_size, config.weight_decay,
        config.standardize or name == "pixels", config.seed,
    )  # fmt: skip
    augmented = config.augment and name != "pixels"
    if augmented:
        layers = varied.fit(task.films, task.labels.values, task.splits, encoder, x, config, recipe)
    else:
        layers = fast.fit(x, task.labels.values, task.splits, recipe)
    rates = [choose(x, task.labels.values, split, layers, k) for k, split in enumerate(task.splits)]
    guesses = [fast.logits(layers, k, rates[k], x[split.test]) for k, split in enumerate(task.splits)]
    found = [_scored(x, task.labels.values, *pair) for pair in zip(task.splits, guesses, strict=True)]
    rows = _rows(task, name, found, {"lr": [config.lrs[rate] for rate in rates], "augment": augmented})
    return rows + strata(task, rows, guesses)


def choose(x: np.ndarray, y: np.ndarray, split: splits.Split, layers: dict, repeat: int) -> int:
    """Place of the rate with the best macro AUPRC on the validation part; the first where none is defined."""
    if layers["kernel"].shape[1] == 1:
        return 0
    macro = [
        scores.mean_of_defined(scores.per_class("auprc", y[split.val], fast.logits(layers, repeat, rate, x[split.val])))
        for rate in range(layers["kernel"].shape[1])
    ]
    return 0 if np.isnan(macro).all() else int(np.nanargmax(macro))


def _scored(x, y, split: splits.Split, guess: np.ndarray) -> dict[str, np.ndarray]:
    """{metric: value of each class} on the test part of a repeat; guess: what the layer says of it [n, C]."""
    truth, train, test = y[split.test], np.zeros(len(x), bool), np.zeros(len(x), bool)
    train[split.train], test[split.test] = True, True
    votes = np.empty_like(guess)
    votes[np.argsort(split.test)] = probe.vote(np.asarray(x), y, train, test)
    return {
        "auprc": scores.per_class("auprc", truth, guess), "auroc": scores.per_class("auroc", truth, guess),
        "knn_auprc": scores.per_class("auprc", truth, votes), "knn_auroc": scores.per_class("auroc", truth, votes),
    }  # fmt: skip


def _rows(task: Task, name: str, found: list[dict], more: dict) -> list[dict]:
    tested = np.unique(np.concatenate([split.test for split in task.splits]))
    truth = task.labels.values[tested]
    about = dict(folds=len(found), seed=task.config.seed, data=task.kind, protocol=task.protocol.kind, **more)
    rows = []
    for metric in found[0]:
        values = np.array([repeat[metric] for repeat in found])  # [R, C]
        for k, label in enumerate(task.labels.names):
            known = {"n": np.sum(~np.isnan(truth[:, k])), "positives": int(np.nansum(truth[:, k]))}
            rows.append(_row(task, name, metric, label, values[:, k], known | about))
        macro = [scores.mean_of_defined(repeat) for repeat in values]
        # A macro that has not the same classes in every repeat says so.
        gaps = dict(zip(task.labels.names, np.isnan(values).sum(axis=0).tolist(), strict=True))
        gaps = {"left_out": {label: count for label, count in gaps.items() if count}} if any(gaps.values()) else {}
        rows.append(_row(task, name, metric, "macro", macro, {"n": len(tested)} | about | gaps))
    return rows


def strata(task: Task, rows: list[dict], guesses: Sequence[np.ndarray]) -> list[dict]:
    """Rows of AUPRC and AUROC in every group of the columns of `config.strata`.

    A group's score is the mean over the repeats, each on the group's films of its test part; a resample of patients
    goes through all repeats alike. guesses: of each repeat, [n, C] of its test part.
    """
    tested = np.unique(np.concatenate([split.test for split in task.splits]))
    columns = {name: column[tested] for name, column in task.columns.items()}
    found = []
    for row in rows:
        if columns and row["metric"] in scores.QUICK:
            score = _score_of_films(task, row["metric"], row["class"], guesses, tested)
            about = {name: row[name] for name in row if name not in ("positives", "reason", "undefined")}
            groups = fairness.strata(score, columns, task.labels.patients[tested], seed=task.config.seed)
            found += [about | group for group in groups]
    return found


def _score_of_films(task: Task, metric: str, label: str, guesses, tested: np.ndarray):
    """The score of an index into `tested`, repeats allowed: its mean over the repeats that are defined."""
    names = task.labels.names
    chosen = [names.index(label)] if label in names else list(range(len(names)))
    y, places = task.labels.values[:, chosen], []
    for split in task.splits:
        place = np.full(len(y), -1)
        place[split.test] = np.arange(len(split.test))
        places.append(place[tested])

    def score(index: np.ndarray) -> float:
        values = []
        for place, guess in zip(places, guesses, strict=True):
            judged = index[place[index] >= 0]
            truth, said = y[tested[judged]], guess[place[judged]][:, chosen]
            values.append(scores.mean_of_defined(scores.per_class(metric, truth, said, scores.QUICK)))
        return scores.mean_of_defined(np.array(values))

    return score


def _row(task: Task, name: str, metric: str, label: str, values, about: dict) -> dict:
    return scores.row("probe", task.config.dataset, _called(task.config, name), metric, label, values, **about)


def _tell(rows: list[dict]) -> None:
    """A line per class: AUPRC with its deviation, AUROC, and the vote's AUPRC; undefined scores are said."""
    rows = [row for row in rows if "stratum" not in row]
    table = {(row["encoder"], row["class"], row["metric"]): row for row in rows}
    for encoder, label in dict.fromkeys((row["encoder"], row["class"]) for row in rows):
        row = table[encoder, label, "auprc"]
        told = [f"{head} {_cell(table[encoder, label, metric])}" for head, metric in (
            ("AUPRC", "auprc"), ("AUROC", "auroc"), ("kNN AUPRC", "knn_auprc"))]  # fmt: skip
        why = f"  ({row['reason']})" if "reason" in row else ""
        share = f", {row['positives']} positive" if "positives" in row else ""
        logs.say(f"probe: {encoder}  {label:24s} {'  '.join(told)}  {row['n']} films{share}{why}  [{row['data']}]")


def _cell(row: dict) -> str:
    if row["value"] is None:
        return "undefined"
    return f"{row['value']:.3f}" + (f" ({row['std']:.3f})" if row["std"] is not None else "")
