"""task=demographics: what frozen features know about the patient, by logistic regression on folds by subject.

Protocol: arXiv 2401.10815, 3.5 and E.3.4. Each film is judged once, by a regression that saw no film of its patient.
results.json has accuracy per target and encoder, mean and deviation over folds, and as encoder "majority" what the most
frequent class of the train part would score.
Letters: n films, D width.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold, KFold

from raddino_jax import encoders, logs
from raddino_jax.data import labels, pipeline, store
from raddino_jax.data.labels import LabelError
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import fairness, features, logistic, scores
from raddino_jax.models import vit

PARTS = {"train": "train", "training": "train", "val": "train", "valid": "train", "validate": "train",
         "validation": "train", "dev": "train", "test": "test"}  # fmt: skip


@dataclass(frozen=True)
class People:
    """films [n], whom each is of, and columns of words about them; kind: synthetic or real."""

    films: features.Films
    patients: np.ndarray
    columns: dict[str, np.ndarray]
    kind: str


@dataclass(frozen=True)
class Fold:
    """Indices of films."""

    train: np.ndarray
    test: np.ndarray


def run(config, workdir: Path) -> None:
    """Judge every encoder and write results.json; a finished run prints its results. Raises DataError, LabelError."""
    workdir = Path(workdir)
    check(config)
    done = workdir / "results.json"
    if done.exists():
        _tell(json.loads(done.read_text()))
        return
    people = read_people(config)
    asked = {target: classes_of(target, people, config) for target in config.targets}
    rows = []
    for name, found in chain(_features(config, people.films), [("majority", None)]):
        rows += judge(name, found, asked, people, config)
    scores.write_rows(workdir, rows)
    _tell(rows)


def check(config) -> None:
    """Raise DataError with every field that cannot be, and its mend."""
    problems = [
        message for bad, message in (
            (not config.targets, "targets is empty: name some of sex, age, weight, bmi, ethnicity, or other columns"),
            (config.feature not in vit.FEATURES, f"feature={config.feature!r} must be in {', '.join(vit.FEATURES)}"),
            (config.solver not in logistic.SOLVERS, f"solver={config.solver!r} must be in {logistic.SOLVERS}"),
            (config.folds < 2 and not config.split_column, "folds must be at least 2"),
            (len(config.data.sources) != 1, f"data.sources={config.data.sources} must name one set"),
            (config.c <= 0 or config.tol <= 0, "c and tol must be positive"),
            (config.max_iter < 1, "max_iter must be at least 1"),
            (any(list(edges) != sorted(set(edges)) for edges in config.bins.values()), "bins must have rising edges"),
        ) if bad
    ]  # fmt: skip
    if problems:
        raise DataError("this config cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


# --- who the films are of -------------------------------------------------------------------------------------


def read_people(config) -> People:
    """The films of the first source and what the columns say of them."""
    names = {config.columns.get(target, target) for target in config.targets} | {*config.strata, config.split_column}
    name = config.data.sources[0]
    data = config.data
    # Drawn films of another seed than those trained on.
    source = pipeline.Synthetic(data.synthetic_size, data.image_size, 1) if name == "synthetic" else \
        pipeline._open(name, data, "all")
    index, patients, columns = _about(source, sorted(names - {""}), config)
    index, patients = index[: config.films or None], patients[: config.films or None]
    logs.say(f"data: {source.kind.upper()} ({len(index)} films of {len(set(patients))} patients of {name})")
    columns = {name: column[: len(index)] for name, column in columns.items()}
    return People(features.Films(source, index), patients, columns, source.kind)


def _about(source, names: list[str], config) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(place of each film in the source, its patient, columns of words). Raises LabelError for what is not there."""
    if isinstance(source, pipeline.Folder):
        if not config.csv:
            raise LabelError("a folder says nothing about patients: name its table with --config.csv=FILE")
        return _csv(source, names, config)
    if isinstance(source, store.Prepared):
        whose, columns = source.name, source.table.select(sorted({*names, "patient"} & {*source.table.column_names}))
        known = {name: columns[name].take(source.films).to_pylist() for name in columns.column_names}
        patient = "patient"
    else:
        whose, patient = "synthetic", "patient_id"
        rows = [source.source.labels(i) for i in range(len(source))]
        known = {name: [row[name] for row in rows] for name in rows[0]}
    if lacking := [name for name in names if name not in known]:
        raise LabelError(f"{whose} has no column {', '.join(map(repr, lacking))}: leave it out of targets or strata")
    columns = {name: np.array([str(value) for value in known[name]]) for name in names}
    return np.arange(len(source)), np.array(known[patient]), columns


def _csv(source, names: list[str], config) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The same of a folder's table."""
    table = (config.csv, source.files)
    found = labels.read_csv(*table, (), config.file_column, config.patient_column, config.where)
    columns = {name: labels.read_column(*table, name, config.file_column, config.where, found.films) for name in names}
    return found.films, found.patients, columns


def classes_of(target: str, people: People, config) -> np.ndarray:
    """The class of each film, "" where it is not known. Raises LabelError that names film and column."""
    name = config.columns.get(target, target)
    column, edges = people.columns[name], tuple(config.bins.get(target, ()))
    found = binned(column, edges, name) if edges else words(column)
    if len(set(found) - {""}) < 2:
        raise LabelError(f"column {name!r}: fewer than two classes among {len(found)} films, nothing to predict")
    return found


def words(column: Sequence[str]) -> np.ndarray:
    """Words as they are; nothing, "nan" and "unknown" are not known."""
    return np.array(["" if word.strip().lower() in ("", "nan", "none", "unknown") else word.strip() for word in column])


def binned(column: Sequence[str], edges: Sequence[float], name: str = "") -> np.ndarray:
    """Numbers as the classes "<20", "20-40", ..., ">=80"; a class holds its lower edge."""
    texts = [f"{edge:g}" for edge in edges]
    classes = [f"<{texts[0]}", *(f"{a}-{b}" for a, b in zip(texts, texts[1:], strict=False)), f">={texts[-1]}"]
    found = []
    for place, word in enumerate(words(column)):
        try:
            found.append(classes[int(np.digitize(float(word), edges))] if word else "")
        except ValueError:
            said = f"column {name!r}, film {place}: expected a number or nothing, found {str(word)!r}"
            raise LabelError(said) from None
    return np.array(found)


# --- folds ----------------------------------------------------------------------------------------------------


def folds_of(people: People, known: np.ndarray, config) -> list[Fold]:
    """Folds of the films at the places `known`; no patient is on both sides unless `by_patient` is off."""
    if config.split_column:
        return [_split(people, known, config.split_column)]
    patients = people.patients[known]
    count = len(np.unique(patients)) if config.by_patient else len(known)
    if count < config.folds:
        who = "patients" if config.by_patient else "films"
        raise DataError(f"{config.folds} folds need as many {who}, found {count}: lower config.folds")
    kind = GroupKFold if config.by_patient else KFold
    groups = patients if config.by_patient else None
    parts = kind(config.folds, shuffle=True, random_state=config.seed).split(known, groups=groups)
    return [Fold(known[train], known[test]) for train, test in parts]


def _split(people: People, known: np.ndarray, column: str) -> Fold:
    told = [word.lower() for word in people.columns[column][known]]
    if unknown := set(told) - set(PARTS):
        raise LabelError(f"column {column!r}: expected {', '.join(PARTS)}; found {', '.join(sorted(unknown))}")
    tested = np.array([PARTS[word] == "test" for word in told])
    torn = set(people.patients[known[tested]]) & set(people.patients[known[~tested]])
    if torn:
        raise LabelError(f"column {column!r}: {len(torn)} patients have films in test and elsewhere")
    if tested.all() or not tested.any():
        found = f"{tested.sum()} of {len(known)}"
        raise LabelError(f"column {column!r}: expected films in test and in train, found {found} in test")
    return Fold(known[~tested], known[tested])


# --- judging --------------------------------------------------------------------------------------------------


def _features(config, films: features.Films) -> Iterator[tuple[str, np.ndarray]]:
    for name in (config.encoder, *config.beside):
        weights = config.weights if name == config.encoder else ""
        began = time.perf_counter()
        encoder = name if name == "pixels" else encoders.load(name, weights=weights)
        found = features.cached(
            encoder, films, config.feature, config.features_dir, config.encode_batch, config.threads
        )  # fmt: skip
        took = logs.duration(time.perf_counter() - began)
        logs.say(f"features of {name}: {found.shape[1]} numbers a film, in {took}")
        yield name + (" (random weights)" if weights == "random" else ""), found


def judge(encoder: str, x: np.ndarray | None, asked: dict, people: People, config) -> list[dict]:
    """Rows of one encoder: accuracy of each target, over folds and in each stratum. x: features; None: the majority."""
    rows = []
    for target, classes in asked.items():
        known = np.flatnonzero(classes != "")
        right = np.full(len(classes), np.nan)  # of each film, by the fold that tests it
        values, rough, solvers = [], 0, set()
        for fold in folds_of(people, known, config):
            predicted, converged, solver = _predict(x, classes, fold, config, encoder == "pixels")
            right[fold.test] = predicted == classes[fold.test]
            values.append(float(right[fold.test].mean()))
            rough, solvers = rough + (not converged), solvers | {solver}
        tested = np.flatnonzero(~np.isnan(right))
        row = scores.row(
            "demographics", config.data.sources[0], encoder, "accuracy", target, values, n=len(tested),
            folds=len(values), seed=config.seed, data=people.kind, classes=len(set(classes) - {""}),
            solver="+".join(sorted(solvers)), unconverged=rough,
        )
        if len(values) == 1:  # one split has no spread over folds; its interval is that of its patients
            row["interval"] = _interval(right, tested, people, config.seed)
        rows += [row, *_strata(row, right, tested, people, config)]
    return rows


def _predict(x, classes: np.ndarray, fold: Fold, config, pixels: bool) -> tuple[np.ndarray, bool, str]:
    """Classes of the test films, whether the fit converged, and by which solver.

    pixels: standardised in any case. Grey levels far from 0 are so badly scaled that L-BFGS ends on their noise, and a
    baseline that is weak for such a reason would flatter the encoders beside it.
    """
    if x is None:
        names, counts = np.unique(classes[fold.train], return_counts=True)
        return np.full(len(fold.test), names[counts.argmax()]), True, "none"
    standardize = config.standardize or pixels
    settings = logistic.Settings(config.c, config.max_iter, config.tol, standardize, config.solver)
    train = x[fold.train]
    fitted = logistic.fit(train, classes[fold.train], settings)
    return fitted.predict(x[fold.test]), fitted.converged, logistic.solver_of(config.solver, train)


def _interval(right: np.ndarray, tested: np.ndarray, people: People, seed: int) -> list[float] | None:
    everyone = {"": np.full(len(tested), "all")}
    return fairness.strata(fairness.mean_of(right[tested]), everyone, people.patients[tested], seed=seed)[0]["interval"]


def _strata(row: dict, right: np.ndarray, tested: np.ndarray, people: People, config) -> list[dict]:
    columns = {name: people.columns[name][tested] for name in config.strata}
    found = fairness.strata(
        fairness.mean_of(right[tested]), columns, people.patients[tested], smallest=config.smallest, seed=config.seed
    )
    return [row | fields for fields in found]


def _tell(rows: list[dict]) -> None:
    for row in rows:
        if not row.get("stratum"):
            logs.say(_line(row))


def _line(row: dict) -> str:
    spread = "" if row["std"] is None else f" ({row['std']:.3f})"
    rough = f"  {row['unconverged']} fits not converged" if row["unconverged"] else ""
    return (
        f"demographics: {row['encoder']:10s} {row['class']:10s} accuracy {row['value']:.3f}{spread}  "
        f"{row['folds']} folds, {row['n']} films, {row['classes']} classes{rough}  [{row['data']}]"
    )
