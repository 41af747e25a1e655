"""Films with what was written about them, to learn and to judge report generation.

A source has `pairs` (what is known of each) and `film(i)` -> uint8 [H, W]. Only frontal films, and only those whose
report has findings. A study with two frontal films counts twice, as in arXiv 2401.10815; of IU X-ray the first alone.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raddino_jax.data import cases, images, labels, pipeline, reports, store, synthetic
from raddino_jax.data.datasets import manifest

DATASETS = ("mimic_cxr", "iu_xray", "folder", "synthetic")
TESTED_ON = ("iu_xray",)  # external tests, never trained on
PAPER = {"mimic_cxr": {"train": 146_909, "val": 7_250, "test": 2_461}, "iu_xray": {"test": 3_306}}


class PairError(pipeline.DataError):
    """Films or texts that cannot be used; the message says what was expected and what to do."""


@dataclass(frozen=True)
class Pair:
    """A film and its findings. split: "train", "val", "test"; facts: further columns of its row."""

    id: str
    patient: str
    split: str
    text: str
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Pairs:
    """kind: "synthetic" or "real". read: place of a pair -> its film, uint8 [H, W]; raw: -> what it is made from."""

    name: str
    kind: str
    pairs: list[Pair]
    read: Callable[[int], np.ndarray]
    raw: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.pairs)

    def film(self, place: int) -> np.ndarray:
        """Raises PairError, which names the film."""
        try:
            return self.read(place)
        except (images.ImageError, OSError) as error:
            raise PairError(f"{self.pairs[place].id}: {error}; mend the file, or take its row out") from error

    def split(self, name: str) -> np.ndarray:
        """Places of the pairs of a split."""
        return np.flatnonzero([pair.split == name for pair in self.pairs])


def open_pairs(config, tell: Callable[[str], None] = lambda line: None) -> Pairs:
    """The pairs of `config.dataset`, a row of DATASETS; tell: hears of a long walk. Raises PairError, LabelError."""
    opener = {"mimic_cxr": _mimic_cxr, "iu_xray": _iu_xray, "folder": _folder, "synthetic": _synthetic}
    if config.dataset not in opener:
        raise PairError(f"dataset={config.dataset!r} must be one of {', '.join(DATASETS)}")
    found = opener[config.dataset](config, tell)
    if not found.pairs:
        raise PairError(f"{config.dataset}: no frontal film has a report with findings")
    return found


def exchanged(patients: Sequence[str], seed: int) -> np.ndarray:
    """For each pair the place of another patient's pair, every place once: what tells films from chance.

    Raises PairError where one patient has more than half of the pairs.
    """
    names, number = np.unique(patients, return_inverse=True)
    order = np.argsort(np.random.default_rng((seed, 2)).permutation(len(names))[number], kind="stable")
    step = np.bincount(number).max()  # with patients side by side, so many places on is somebody else
    if 2 * step > len(order):
        raise PairError(f"one patient has {step} of {len(order)} pairs: too few others to exchange films with")
    out = np.empty(len(order), int)
    out[order] = np.roll(order, -step)
    return out


# --- the sources ----------------------------------------------------------------------------------------------


def _synthetic(config, tell) -> Pairs:
    """Frontal drawn films, other ones than encoders are trained on, each with its sentence."""
    data, seed = config.data, 3
    source = synthetic.Synthetic(data.films, data.image_size, seed)
    every = ((i, synthetic.case(i, seed)) for i in range(len(source)))
    frontal = [(i, case) for i, case in every if case.pose.view != "LATERAL"]
    pairs = []
    for i, case in frontal:
        known = source.labels(i)
        pairs.append(Pair(f"synthetic-{i}", known["patient_id"], "", synthetic.sentence(case), known))
    numbers = [i for i, _ in frontal]
    return Pairs(
        "synthetic", "synthetic", _split(pairs, config.seed), lambda place: source[numbers[place]],
        lambda place: f"synthetic {seed} {numbers[place]} {data.image_size}".encode(),
    )  # fmt: skip


def _split(pairs: list[Pair], seed: int) -> list[Pair]:
    """With the splits that are theirs, or drawn by patient."""
    splits = cases.with_splits(pairs, seed)
    return [dataclasses.replace(pair, split=split) for pair, split in zip(pairs, splits, strict=True)]


def _folder(config, tell) -> Pairs:
    """Picture files, by a table with their texts."""
    data = config.data
    if not data.csv:
        raise PairError("dataset=folder needs config.data.csv, a table with a row per film")
    optional = [data.split_column] if data.split_column else []
    needed = [data.file_column, data.text_column, data.patient_column, *optional]
    rows = [row for _, row in labels.read_rows(data.csv, needed, data.where) if row[data.text_column].strip()]
    files = [cases.located(row[data.file_column], data.images, Path(data.csv).parent) for row in rows]
    pairs = [
        Pair(
            row[data.file_column], row[data.patient_column].strip(), row[data.split_column] if optional else "",
            reports.clean(row[data.text_column]), row,
        ) for row in rows
    ]  # fmt: skip
    if nobody := [pair.id for pair in pairs if not pair.patient]:
        raise PairError(f"{data.csv}: {nobody[0]} has no patient ({data.patient_column}), so no side of a split")
    _refuse_twice([pair.id for pair in pairs], data.csv)
    return Pairs(
        "folder", "real", _split(pairs, config.seed), lambda place: images.read(files[place]),
        lambda place: files[place].read_bytes(),
    )  # fmt: skip


def _refuse_twice(ids: Sequence[str], where: str) -> None:
    if len(set(ids)) < len(ids):
        twice = next(name for k, name in enumerate(ids) if name in ids[:k])
        raise PairError(f"{where}: {twice} has several rows, expected one")


def _iu_xray(config, tell) -> Pairs:
    """The first frontal film of each report: all of them are the test."""
    source, rows = _prepared(config.data.data_dir, "iu_xray")
    if not any(row["first_frontal"] == 1 for row in rows):
        raise PairError(
            "iu_xray was prepared without a table that says which films are frontal: put Kaggle's "
            "indiana_projections.csv beside its files and prepare it again"
        )
    chosen = [i for i, row in enumerate(rows) if row["first_frontal"] == 1 and row["findings"].strip()]
    known = [rows[i] for i in chosen]
    pairs = [Pair(row["id"], row["patient"], "test", reports.clean(row["findings"]), row) for row in known]
    return _of_records("iu_xray", source, chosen, pairs)


def _mimic_cxr(config, tell) -> Pairs:
    """Frontal films of the official splits; a share of train's patients validates too."""
    source, rows = _prepared(config.data.data_dir, "mimic_cxr")
    texts = _mimic_texts(config.data.reports, tell)
    chosen, pairs = [], []
    for i, row in enumerate(rows):
        text = texts.get(row["study"].removeprefix("s"))
        if text and row["view"] == "frontal":
            chosen.append(i)
            pairs.append(Pair(row["id"], row["patient"], _mimic_split(row, config.data.val), text, row))
    if not pairs:
        raise PairError(
            f"config.data.reports={config.data.reports}: {len(texts)} reports with findings, none of a study of the "
            f"{len(rows)} prepared films; study numbers are expected, e.g. {rows[0]['study']}"
        )
    return _of_records("mimic_cxr", source, chosen, pairs)


def _mimic_split(row: dict, val: float) -> str:
    taken = row["split"] == "train" and manifest.share(row["patient"], "reports") < val
    return "val" if taken else row["split"]


def _mimic_texts(where: str, tell) -> dict[str, str]:
    """Number of a study -> its findings."""
    path = Path(where)
    if not where or not path.exists():
        raise PairError(
            f"config.data.reports={where!r}: expected the folder of mimic-cxr-reports.zip, unpacked, or "
            "mimic_cxr_sectioned.csv, found neither"
        )
    try:
        found = _told(reports.read_mimic(path), tell) if path.is_dir() else reports.read_sectioned(path)
        return {study.removeprefix("s"): text for study, text in found}
    except (manifest.ManifestError, OSError, UnicodeDecodeError) as error:
        raise PairError(f"config.data.reports={where}: {error}") from error


def _told(found: Iterable, tell: Callable[[str], None]) -> Iterable:
    """The same, saying every ten seconds how far it is."""
    began = told = time.perf_counter()
    for count, one in enumerate(found, start=1):
        if time.perf_counter() - told > 10:
            told = time.perf_counter()
            tell(f"reports: {count} with findings so far, {count / (told - began):.0f}/s")
        yield one


def _prepared(data_dir: str, name: str) -> tuple[store.Prepared, list[dict]]:
    if not data_dir or not store.is_prepared(data_dir, name):
        raise PairError(
            f"dataset {name!r} is not prepared in data_dir {data_dir!r}: python -m raddino_jax.prepare "
            f"--dataset={name} --raw_dir=DIR --data_dir={data_dir or 'DIR'} (config.data.data_dir says where)"
        )
    source = store.Prepared(data_dir, name, image_size=0, part="all")
    return source, source.table.to_pylist()


def _of_records(name: str, source: store.Prepared, chosen: Sequence[int], pairs: list[Pair]) -> Pairs:
    """Films in the size they are stored in. chosen: the record of each pair."""
    return Pairs(
        name, "real", pairs, lambda place: store.pixels(source.records[chosen[place]], source.widths[chosen[place]]),
        lambda place: source.records[chosen[place]],
    )  # fmt: skip
