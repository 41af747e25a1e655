"""task=probe: a linear layer on a frozen encoder, and a kNN vote beside it, by the protocols of `splits`.

Learning rates are chosen by the validation part of each repeat; its test part is looked at once, by the layer chosen.
Letters: n films, S pixels per side, B of a batch, D width, C classes, R repeats, L learning rates.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from raddino_jax import augment, encoders, logs, sharding
from raddino_jax.data import labels, pipeline, store
from raddino_jax.data.labels import LabelError, Labels
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import deform, fast, features, frames, heads, probe, scores, splits
from raddino_jax.models import vit

Array = jax.Array


@dataclass(frozen=True)
class Task:
    """Films, what is known of them, and who is learned from. kind: synthetic or real."""

    config: object
    films: features.Films
    labels: Labels
    splits: list[splits.Split]
    protocol: splits.Protocol
    kind: str


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
    return Task(config, features.Films(source, found.films), found, cut, protocol, source.kind)


def _source(config):
    if config.dataset == "synthetic":  # other films than those trained on
        return pipeline.Synthetic(config.data.synthetic_size, config.data.image_size, seed=1)
    name = f"folder:{config.images}" if config.dataset == "folder" else config.dataset
    return pipeline._open(name, config.data, "all")


def _official(config, source, found: Labels, protocol: splits.Protocol) -> Sequence[str] | None:
    """The split that the dataset gives each film, where the protocol asks for it."""
    if protocol.kind != "official":
        return None
    if isinstance(source, store.Prepared):
        return source.table[config.split_column or "split"].take(source.films[found.films]).to_pylist()
    if isinstance(source, pipeline.Folder) and config.split_column:
        told = (config.split_column, config.file_column, protocol.where)
        return labels.read_column(config.csv, source.files, *told, films=found.films)
    return None


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
    varied = config.augment and name != "pixels"
    if varied:
        layers = fit_on_views(task, encoder, x, recipe)
    else:
        layers = fast.fit(x, task.labels.values, task.splits, recipe)
    rates = [choose(x, task.labels.values, split, layers, k) for k, split in enumerate(task.splits)]
    found = [_scored(x, task.labels.values, split, layers, k, rates[k]) for k, split in enumerate(task.splits)]
    return _rows(task, name, found, {"lr": [config.lrs[rate] for rate in rates], "augment": varied})


def choose(x: np.ndarray, y: np.ndarray, split: splits.Split, layers: dict, repeat: int) -> int:
    """Place of the rate with the best macro AUPRC on the validation part; the first where none is defined."""
    if layers["kernel"].shape[1] == 1:
        return 0
    macro = [
        scores.mean_of_defined(scores.per_class("auprc", y[split.val], fast.logits(layers, repeat, rate, x[split.val])))
        for rate in range(layers["kernel"].shape[1])
    ]
    return 0 if np.isnan(macro).all() else int(np.nanargmax(macro))


def _scored(x, y, split: splits.Split, layers: dict, repeat: int, rate: int) -> dict[str, np.ndarray]:
    """{metric: value of each class} on the test part of a repeat. The vote is that of the train part."""
    truth, train, test = y[split.test], np.zeros(len(x), bool), np.zeros(len(x), bool)
    train[split.train], test[split.test] = True, True
    guess = fast.logits(layers, repeat, rate, x[split.test])
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
        rows.append(_row(task, name, metric, "macro", macro, {"n": len(tested)} | about))
    return rows


def _row(task: Task, name: str, metric: str, label: str, values, about: dict) -> dict:
    return scores.row("probe", task.config.dataset, _called(task.config, name), metric, label, values, **about)


def _tell(rows: list[dict]) -> None:
    """A line per class: AUPRC with its deviation, AUROC, and the vote's AUPRC; undefined scores are said."""
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


# --- with augmentation ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variation:
    """How films vary, hi-ml's numbers; noise: standard deviation in units of white, with a chance of `noisy`."""

    rotation: float = 30.0
    shear: float = 15.0
    scale: tuple[float, float] = (0.8, 1.0)  # of the area that a crop keeps
    flip: float = 0.5
    gamma: tuple[float, float] = (0.5, 1.5)
    brightness: float = 0.2
    contrast: float = 0.2
    noise: float = 0.05
    noisy: float = 0.5


def vary(key: Array, film: Array, settings: Variation) -> Array:
    """A film, levels float32 [S, S], turned, cropped, mirrored, under another exposure, with noise."""
    s = settings
    turn, crop, mirror, grain = jax.random.split(key, 4)
    moved = deform.Deformation(
        affine=1.0, rotation=s.rotation, shear=s.shear, elastic=0.0, flip=0.0, gamma=s.gamma,
        brightness=s.brightness, contrast=s.contrast,
    )  # fmt: skip
    film, _ = deform.deform(turn, film, jnp.zeros((*film.shape, 0), jnp.uint8), moved)
    box = augment.crop_box(
        jax.random.uniform(crop, (4, augment.CROP_TRIES)), film.shape, jnp.array(s.scale), (3 / 4, 4 / 3), "area"
    )
    film = augment.resized_crop(film, box, film.shape[0], jax.random.uniform(mirror) < s.flip)
    chance, noise = jax.random.split(grain)
    strength = 255 * s.noise * (jax.random.uniform(chance) < s.noisy)
    return jnp.clip(film + strength * jax.random.normal(noise, film.shape), 0, 255)


def fit_on_views(task: Task, encoder, x: np.ndarray, recipe: fast.Recipe) -> dict:
    """As `fast.fit`, but every step sees its films varied anew and encodes them; repeats one after the other.

    x: features of the films as they are, for standardising.
    """
    about = {"preprocess": repr(encoder.settings)}

    def cut(film):
        return frames.framed(film, encoder.settings, "crop")[0]

    levels = features.squares(task.films, cut, about, task.config.features_dir)
    step = jax.jit(_view_step(task.config, encoder, recipe), donate_argnums=0)
    found = [_fit_one(task, encoder, x, levels, recipe, step, k) for k in range(len(task.splits))]
    return {name: np.stack([layers[name] for layers in found]) for name in found[0]}


def _view_step(config, encoder, recipe: fast.Recipe):
    given = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in config.variation.items()}
    variation = Variation(**given)
    frozen_head = heads.Head(None, encoder.settings, None)  # levels to what the network reads

    def step(states, frozen, levels, y, here, plan, lrs, number):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(jax.random.fold_in(plan.key, 1), number), jnp.arange(len(levels))
        )
        films = jax.vmap(lambda key, film: vary(key, film, variation))(keys, levels.astype(jnp.float32))
        found = vit.FEATURES[config.feature](encoder._features(frozen, frozen_head.features({}, films)))
        z = (jax.lax.stop_gradient(found).astype(jnp.float32) - plan.mean) / plan.scale
        return jax.vmap(lambda state, lr: fast.update(state, z, y, here, lr, number, plan.steps, recipe))(states, lrs)

    return step


def _fit_one(task: Task, encoder, x, levels, recipe: fast.Recipe, step, repeat: int) -> dict:
    plan = fast.plan(x, task.splits[repeat].train, recipe, repeat, encoder.mesh.size)
    rows, everywhere = sharding.batch_sharding(encoder.mesh), NamedSharding(encoder.mesh, P())
    first = fast.start(plan.key, x.shape[1], len(task.labels.names), recipe)
    states = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(recipe.lrs), axis=0), first)
    states, lrs = jax.device_put(states, everywhere), jnp.array(recipe.lrs)
    constant = jax.device_put(plan._replace(order=None), everywhere)
    began = told = time.perf_counter()
    for number, index in enumerate(plan.order):
        batch = [levels[index.clip(0)], task.labels.values[index.clip(0)], index >= 0]
        batch = [jax.device_put(part, rows) for part in batch]
        states = step(states, encoder.params, *batch, constant, lrs, jnp.int32(number))
        if (now := time.perf_counter()) - told > 10:
            jax.block_until_ready(states)
            now = told = time.perf_counter()
            done = number + 1
            logs.say(f"probe: repeat {repeat + 1}/{len(task.splits)}, step {done}/{len(plan.order)}, "
                     f"eta {logs.duration((now - began) * (len(plan.order) - done) / done)}")
    layers = {name: np.asarray(value) for name, value in states.params.items()}
    return layers | {"mean": plan.mean, "scale": plan.scale}
