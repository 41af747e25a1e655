"""What frozen features know: a closed-form linear probe and a kNN vote on splits by patient.

Both are scored online while a run trains, and at its end against the run's own initialisation and against plain pixels.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from raddino_jax import encoders, logs
from raddino_jax.data import pipeline
from raddino_jax.data.labels import Labels
from raddino_jax.evals import scores
from raddino_jax.evals.features import encode, raster

PENALTIES = np.logspace(0, 5, 11)
NEIGHBOURS = 20
BLOCK = 1024  # test films whose distances to all train films are held at a time


def split(patients: np.ndarray, seed: int, test: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Boolean masks (train, test) over films; all films of a patient are on one side."""
    names = np.unique(patients)
    np.random.default_rng(seed).shuffle(names)
    tested = np.isin(patients, names[: max(int(round(len(names) * test)), 1)])
    return ~tested, tested


def ridge(features: np.ndarray, values: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores [test, C] of one ridge regression per class on standardised features.

    The penalty is chosen by leave-one-out inside the train part, per class; films without the label take no part.
    """
    predicted = np.zeros((test.sum(), values.shape[1]))
    known = ~np.isnan(values)
    for pattern in np.unique(known[train], axis=1).T:  # classes assessed on the same films are solved together
        columns = np.flatnonzero((known[train] == pattern[:, None]).all(axis=0))
        if not pattern.any():
            predicted[:, columns] = np.nan
            continue
        x, y = features[train][pattern], values[train][pattern][:, columns]
        model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES, alpha_per_target=True))
        predicted[:, columns] = model.fit(x, y).predict(features[test]).reshape(-1, len(columns))
    return predicted


def vote(features: np.ndarray, values: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Share [test, C] of positives among the nearest train films by cosine of standardised features."""
    x = StandardScaler().fit(features[train]).transform(features)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    tested, trained = x[test], x[train]
    blocks = (tested[start : start + BLOCK] for start in range(0, len(tested), BLOCK))
    labels = values[train][np.concatenate([_nearest(-(block @ trained.T)) for block in blocks])]
    known = ~np.isnan(labels)
    return np.where(known, labels, 0).sum(1) / np.maximum(known.sum(1), 1)


def _nearest(far: np.ndarray) -> np.ndarray:
    """Columns of the NEIGHBOURS smallest of each row, in any order; of equals those that come first."""
    if far.shape[1] <= NEIGHBOURS:
        return np.broadcast_to(np.arange(far.shape[1]), far.shape)
    near = np.argpartition(far, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS].copy()  # a view would keep all columns
    tied = (far <= np.take_along_axis(far, near[:, -1:], axis=1)).sum(1) > NEIGHBOURS
    near[tied] = np.argsort(far[tied], axis=1, kind="stable")[:, :NEIGHBOURS]
    return near


def score(features: np.ndarray, labels: Labels, seed: int) -> dict[tuple[str, str], float]:
    """{(metric, class): value} of one split; class "macro" is the mean over classes that can be scored."""
    train, test = split(labels.patients, seed)
    truth = labels.values[test]
    linear, votes = (rule(features, labels.values, train, test) for rule in (ridge, vote))
    found = {
        "auprc": scores.per_class("auprc", truth, linear),
        "auroc": scores.per_class("auroc", truth, linear),
        "knn_auprc": scores.per_class("auprc", truth, votes),
        "knn_accuracy": scores.accuracy(truth, votes),
    }
    rows = {(m, name): v for m, values in found.items() for name, v in zip(labels.names, values, strict=True)}
    return rows | {(metric, "macro"): float(np.nanmean(values)) for metric, values in found.items()}


def observe(step: int, features: np.ndarray, labels: Labels) -> dict[str, float]:
    """What a training run logs beside its loss: macro scores of the first split."""
    found = score(features, labels, seed=0)
    return {f"probe_{metric}": found[metric, "macro"] for metric in ("auprc", "auroc", "knn_auprc", "knn_accuracy")}


def run(config, workdir: Path) -> None:
    """Compare a run's teacher with its initialisation and with pixels; write results.json.

    Skipped with one line where the sources have no labels.
    """
    workdir = Path(workdir)
    labelled = pipeline.labelled_films(config.data, config.eval)
    if labelled is None:
        logs.say("probe: skipped, the sources have no labels (config.eval.csv names a table)")
        return
    films, labels, kind = labelled
    features = {name: make() for name, make in _features(workdir, films, config.eval.feature)}
    rows = [
        row
        for name, values in features.items()
        for row in _rows(name, values, labels, config, kind)
    ]
    scores.write_rows(workdir, rows)
    for name in features:
        logs.say(_line(name, rows))


def _features(workdir: Path, films: list[np.ndarray], feature: str) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """The rivals: the trained teacher, the same network before training, a grey raster."""
    yield "teacher", lambda: encode(encoders.load(str(workdir)), films, feature)
    start = str(workdir / "checkpoints" / "0")
    yield "init", lambda: encode(encoders.load(start), films, feature)
    yield "pixels", lambda: np.stack([raster(film) for film in films])


def _rows(encoder: str, features: np.ndarray, labels: Labels, config, kind: str) -> list[dict]:
    seeds = [score(features, labels, seed) for seed in range(config.eval.seeds)]
    about = dict(n=len(labels), folds=1, seed=list(range(len(seeds))), data=kind)
    return [
        scores.row(
            "probe", "+".join(config.data.sources), encoder, metric, name, [s[metric, name] for s in seeds], **about
        )
        for metric, name in seeds[0]
    ]


def _line(encoder: str, rows: list[dict]) -> str:
    macro = {r["metric"]: r for r in rows if r["encoder"] == encoder and r["class"] == "macro"}
    auprc = macro["auprc"]
    spread = "95 % interval {:.3f} to {:.3f}, ".format(*auprc["interval"]) if auprc["interval"] else ""
    return (
        f"probe: {encoder:8s} macro AUPRC {auprc['value']:.3f} ({spread}{len(auprc['seed'])} splits by patient)  "
        f"AUROC {macro['auroc']['value']:.3f}  kNN accuracy {macro['knn_accuracy']['value']:.3f}  [{auprc['data']}]"
    )
