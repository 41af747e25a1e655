"""Who is learned from, who chooses, and who judges: protocols of probes and their splits, always by patient.

The rows of PROTOCOLS are those of arXiv 2401.10815, D.2, E.3.1 and C.3; any other labelled set gets `Protocol()`.
Letters: n films.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raddino_jax.data.datasets import candid_ptx, padchest, vindr_cxr
from raddino_jax.data.labels import LabelError

TRAIN, TEST = ("train", "training", "val", "valid", "validate", "validation", "dev"), ("test",)
KINDS = ("folds", "official", "seeds")


@dataclass(frozen=True)
class Protocol:
    """kind: "folds", every patient is judged once; "official", folds over the dataset's train part, of which one
    chooses, and judged on its test part; "seeds", drawn anew by `parts` (train, validation, test).

    validation: share of the patients of "folds" that are not judged, to choose by. labels: () = all that the source
    has. where: "column=value" keeps films. balanced: as many films without a label as with it, others masked.
    """

    kind: str = "folds"
    repeats: int = 5
    parts: tuple[float, float, float] = (0.6, 0.2, 0.2)
    validation: float = 0.2
    labels: tuple[str, ...] = ()
    where: str = ""
    balanced: bool = False


@dataclass(frozen=True)
class Split:
    """Indices of films: what the layer is fitted to, what settings are chosen by, what is reported."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


PROTOCOLS = {
    # D.2 and Table 1: the caption's 1500 films to train are 15,000, folds over them, judged on the official 3,000.
    "vindr_cxr": Protocol("official", labels=vindr_cxr.PAPER),
    # Table C.1: 60/20/20 by subject, five seeds; 3,833 and 5,337 films are judged.
    "candid_ptx": Protocol("seeds", labels=candid_ptx.STRUCTURES),
    "rsna_pneumonia": Protocol("seeds", labels=("Pneumonia",)),
    # C.3: lateral films, three tasks, each balanced: 11.9k films, 80/10/10 by subject, five seeds.
    "padchest": Protocol("seeds", parts=(0.8, 0.1, 0.1), labels=padchest.LATERAL_PROBE, where="lateral_probe=1.0",
                         balanced=True),
}  # fmt: skip


def protocol_of(config) -> Protocol:
    """The dataset's row, or what any other set gets, changed by the config's fields that are not empty."""
    row = PROTOCOLS.get(config.dataset, Protocol())
    own = "official" if config.split_column and config.dataset not in PROTOCOLS else row.kind
    given = {
        "kind": config.protocol or own, "repeats": config.repeats or row.repeats,
        "labels": tuple(config.labels) or row.labels, "where": config.where or row.where,
    }  # fmt: skip
    return Protocol(**(vars(row) | given))


def splits_of(protocol: Protocol, patients: Sequence[str], official: Sequence[str] | None, seed: int) -> list[Split]:
    """One split per repeat of n films. official: the split that the dataset gives each film, for kind "official".

    Raises LabelError where a part would be empty or the official parts share a patient.
    """
    patients = np.asarray(patients)
    if protocol.kind == "official":
        found = _official(protocol, patients, official, seed)
    elif protocol.kind == "folds":
        found = _folds(protocol, patients, seed)
    else:
        found = [_drawn(patients, protocol.parts, seed + k) for k in range(protocol.repeats)]
    for k, split in enumerate(found):
        if lacking := [name for name, part in vars(split).items() if not len(part)]:
            raise LabelError(f"repeat {k}: no patient left for {', '.join(lacking)}, of {len(set(patients))} in all")
    return found


def _groups(patients: np.ndarray, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Films in groups of whole patients, the patients shuffled and dealt out in these shares."""
    names = np.unique(patients)
    np.random.default_rng(seed).shuffle(names)
    edges = np.round(np.cumsum(shares)[:-1] * len(names)).astype(int)
    return [np.flatnonzero(np.isin(patients, part)) for part in np.split(names, edges)]


def _drawn(patients: np.ndarray, parts: Sequence[float], seed: int) -> Split:
    return Split(*_groups(patients, parts, seed))


def _folds(protocol: Protocol, patients: np.ndarray, seed: int) -> list[Split]:
    found = []
    for k, test in enumerate(_groups(patients, [1 / protocol.repeats] * protocol.repeats, seed)):
        rest = np.setdiff1d(np.arange(len(patients)), test)
        parts = _groups(patients[rest], (1 - protocol.validation, protocol.validation), seed + 1000 + k)
        found.append(Split(*(rest[part] for part in parts), test))
    return found


def _official(protocol: Protocol, patients: np.ndarray, official, seed: int) -> list[Split]:
    if official is None:
        raise LabelError("protocol official needs a column that says train or test: name it with config.split_column")
    told = [str(word).strip().lower() for word in official]
    if unknown := sorted(set(told) - {*TRAIN, *TEST}):
        raise LabelError(f"split column: expected {', '.join((*TRAIN, *TEST))}; found {', '.join(map(repr, unknown))}")
    test, rest = np.flatnonzero(np.isin(told, TEST)), np.flatnonzero(np.isin(told, TRAIN))
    if torn := set(patients[test]) & set(patients[rest]):
        whose = f"{len(torn)} patients have films in test and elsewhere"
        raise LabelError(f"split column: {whose}, e.g. {str(min(torn))!r}")
    folds = [rest[part] for part in _groups(patients[rest], [1 / protocol.repeats] * protocol.repeats, seed)]
    if protocol.repeats == 1:
        return [Split(*(rest[part] for part in _groups(patients[rest], (0.8, 0.2), seed)), test)]
    return [Split(np.setdiff1d(rest, fold), fold, test) for fold in folds]


def balanced(values: np.ndarray, seed: int) -> np.ndarray:
    """Labels [n, C] of which every class keeps as many films without it, at random, as with it; others NaN."""
    out, rng = np.full_like(values, np.nan), np.random.default_rng(seed)
    for column in range(values.shape[1]):
        positive, negative = (np.flatnonzero(values[:, column] == value) for value in (1, 0))
        kept = rng.permutation(negative)[: len(positive)]
        out[positive, column], out[kept, column] = 1, 0
    return out
