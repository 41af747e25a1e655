"""Films with masks, to learn and to judge segmentation: drawn ones, prepared datasets, or folders of pictures.

A source has `structures` (names), `cases` (what is known of each film) and `load(i)` -> (film uint8 [H, W], masks uint8
[C, H, W] of 0, 1 and IGNORE, where nobody said). Structures of a folder are written "name=127", "name=3|4" or "name>0":
the values that stand for them in a mask. What a mask may be otherwise:
  all zero           a film without the structures
  all of one value   a film that is nothing else
  of another size    brought to the film's size, nearest neighbour, where the proportions agree within 2 %, else refused
  of other values    refused, or by `config.data.other` taken for background or left out ("ignore")
"""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raddino_jax.data import images, pipeline, shapes, store, synthetic
from raddino_jax.data.anatomy import RIBS, SIDES, ZONES
from raddino_jax.data.shapes import IGNORE

OTHER = ("refuse", "background", "ignore")
PROPORTIONS = 0.02  # by which height / width of film and mask may differ
SPLITS = ("train", "val", "test")


class CaseError(pipeline.DataError):
    """Films or masks that cannot be used; the message names the file and what to do."""


class Target(NamedTuple):
    """What the paper segments: a dataset as `prepare` names it, and which of its masks, () for all."""

    dataset: str
    structures: tuple[str, ...]


TARGETS = {
    "lungs": Target("mimic_lungs", ("right lung", "left lung")),
    "zones": Target("chest_imagenome", ()),
    "pneumothorax": Target("candid_ptx", ("pneumothorax",)),
    "tubes": Target("candid_ptx", ("chest tube",)),
    "ribs": Target("vindr_ribcxr", ()),
}


@dataclass(frozen=True)
class Case:
    """A film with masks. split: "train", "val", "test", "" where the source has none; facts: its line in the table."""

    id: str
    patient: str
    split: str = ""
    facts: dict = field(default_factory=dict)


def open_cases(config):
    """The source that `config.dataset` names, with the structures of `config.structures`, () for all.

    A row of TARGETS, "synthetic", "folder" (`config.data` says where), or any prepared dataset. Raises DataError.
    """
    name, data = config.dataset, config.data
    if name == "synthetic":
        return Drawn(data.films, data.image_size, tuple(config.structures))
    if name == "folder":
        return Pictures(data, tuple(config.structures))
    target = TARGETS.get(name, Target(name, ()))
    return Prepared(data, target.dataset, tuple(config.structures) or target.structures)


def with_splits(cases: Sequence[Case], seed: int, val: float = 0.15, test: float = 0.15) -> list[str]:
    """The split of each case, by patient: the source's own, and drawn where it has none.

    A source without a val part gives up a share of its train part.
    """
    patients = np.unique([case.patient for case in cases])
    np.random.default_rng(seed).shuffle(patients)
    edges = np.cumsum([round(val * len(patients)), round(test * len(patients))])
    drawn = {p: "val" if i < edges[0] else "test" if i < edges[1] else "train" for i, p in enumerate(patients)}
    if not any(case.split for case in cases):
        return [drawn[case.patient] for case in cases]
    unknown = sorted({case.split for case in cases} - set(SPLITS))
    if unknown:
        raise CaseError(f"splits are train, val and test; found {', '.join(map(repr, unknown))} (data.split_column)")
    given = [case.split for case in cases]
    if "val" in given:
        return given
    return [
        "val" if split == "train" and drawn[case.patient] == "val" else split
        for split, case in zip(given, cases, strict=True)
    ]


# --- drawn films --------------------------------------------------------------------------------------------

LUNGS = tuple(f"{side} lung" for side in SIDES)


class Drawn:
    """Frontal synthetic radiographs, other ones than those that encoders are trained on.

    Structures: both lungs (the default), six zones, twenty ribs, and the findings.
    """

    kind, name = "synthetic", "synthetic"

    def __init__(self, films: int, image_size: int, structures: tuple[str, ...] = ()):
        self.structures = structures or LUNGS
        known = (*LUNGS, *ZONES, *RIBS, *synthetic.FINDINGS)
        _refuse_unknown(self.structures, known, "the synthetic films")
        self.source = synthetic.Synthetic(3 * films, image_size, seed=2)
        labels = ((i, self.source.labels(i)) for i in range(len(self.source)))
        frontal = [(i, facts) for i, facts in labels if facts["view"] != "LATERAL"][:films]
        self.places = [i for i, _ in frontal]
        self.cases = [Case(f"synthetic-{i}", facts["patient_id"], facts=facts) for i, facts in frontal]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        film = self.source.film(self.places[index], masks=True)
        found = {name: film.masks[name] for name in synthetic.FINDINGS}
        for names, kind in ((LUNGS, "lungs"), (ZONES, "zones"), (RIBS, "ribs")):
            found |= dict(zip(names, film.masks[kind], strict=True))
        return film.image, np.stack([found[name] for name in self.structures]).astype(np.uint8)


def _refuse_unknown(asked: Sequence[str], known: Sequence[str], whose: str) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise CaseError(f"config.structures: {whose} have no {', '.join(unknown)}; they have {', '.join(known)}")


# --- prepared datasets --------------------------------------------------------------------------------------


class Prepared:
    """The films of a prepared dataset that has masks, in the size they are stored in."""

    kind = "real"

    def __init__(self, data, name: str, structures: tuple[str, ...] = ()):
        if not data.data_dir or not store.is_prepared(data.data_dir, name):
            raise CaseError(
                f"dataset {name!r} is not prepared in data_dir {data.data_dir!r}: python -m raddino_jax.prepare "
                f"--dataset={name} --raw_dir=DIR --data_dir={data.data_dir or 'DIR'} (config.data.data_dir says where)"
            )
        self.name = name
        self.source = store.Prepared(data.data_dir, name, image_size=0, part="all")
        drawn = self.source.summary["masks"]
        if not drawn:
            raise CaseError(f"dataset {name!r} has no masks")
        self.structures = structures or tuple(drawn)
        _refuse_unknown(self.structures, drawn, f"films of {name}")
        self.order = [drawn.index(structure) for structure in self.structures]
        column, _, wanted = data.where.partition("=")
        rows = self.source.table.to_pylist()
        self.places = [i for i, row in enumerate(rows) if not column or str(row.get(column, "")) == wanted]
        self.cases = [Case(rows[i]["id"], rows[i]["patient"], rows[i]["split"], rows[i]) for i in self.places]
        self.features = _features(self.source.folder)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = self.features.deserialize_example_np(self.source.records[self.places[index]])
        return record["image"][..., 0], np.moveaxis(record["masks"], -1, 0)[self.order]


def _features(folder: Path):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).info.features


# --- pictures -----------------------------------------------------------------------------------------------


class Pictures:
    """Films and masks as picture files: by a table, or two folders with the same names in them.

    data: `config.data`. images, masks: folders, with the same ones in both or none. csv: a table with a column for the
    film, the mask, the patient, the split and, where regions are to be left out, a mask of those; `where`
    "column=value" keeps rows. Films without a mask are left out. Without a table every film is a patient of its own.
    """

    kind, name = "real", "folder"

    def __init__(self, data, structures: tuple[str, ...] = ()):
        if data.other not in OTHER:
            raise CaseError(f"config.data.other={data.other!r} must be one of {', '.join(OTHER)}")
        rules = [rule_of(text) for text in structures or ("mask>0",)]
        self.structures = tuple(rule.name for rule in rules)
        self.rules, self.other = rules, data.other
        rows = _rows(data) if data.csv else _pairs(data)
        if not rows:
            raise CaseError("no film has a mask: config.data.csv, or config.data.images and .masks, say where they are")
        self.files = [files for _, files in rows]
        self.cases = [case for case, _ in rows]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        film, mask, ignore = self.files[index]
        try:
            grey = images.read(film)
            values = _fitted(images.read_raw(mask), grey.shape, mask)
            masks = structures_of(values, self.rules, self.other, mask)
            if ignore:
                masks[:, _fitted(images.read_raw(ignore), grey.shape, ignore) > 0] = IGNORE
        except (images.ImageError, OSError) as error:
            raise CaseError(f"{film.name} with {mask.name}: {error}") from error
        return grey, masks


class Rule(NamedTuple):
    """A structure and the values that stand for it: those listed, or all above `above`."""

    name: str
    values: tuple[int, ...]
    above: int = -1

    def select(self, values: np.ndarray) -> np.ndarray:
        return values > self.above if self.above >= 0 else np.isin(values, self.values)


def rule_of(text: str) -> Rule:
    """"right lung=127", "heart=3|4", "lungs>0" -> Rule. Raises CaseError."""
    match = re.fullmatch(r"\s*([^=>]+?)\s*(?:=\s*(\d+(?:\|\d+)*)|>\s*(\d+))\s*", text)
    if not match:
        raise CaseError(f"config.structures: {text!r} is none of 'name=127', 'name=3|4', 'name>0'")
    name, values, above = match.groups()
    return Rule(name, (), int(above)) if above else Rule(name, tuple(int(v) for v in values.split("|")))


def structures_of(values: np.ndarray, rules: Sequence[Rule], other: str, path: Path) -> np.ndarray:
    """A mask of values [H, W] -> uint8 [C, H, W] of 0, 1 and IGNORE. Raises CaseError for values without a name."""
    masks = np.stack([rule.select(values) for rule in rules]).astype(np.uint8)
    stray = (values != 0) & ~masks.any(axis=0)
    if stray.any() and other == "refuse":
        found = ", ".join(map(str, np.unique(values[stray])[:5]))
        raise CaseError(
            f"{path}: no structure stands for the values {found}; name them in config.structures, or set "
            "config.data.other to 'background' or 'ignore'"
        )
    if other == "ignore":
        masks[:, stray] = IGNORE
    return masks


def _fitted(values: np.ndarray, shape: tuple[int, int], path: Path) -> np.ndarray:
    """A mask in the size of its film."""
    if values.shape == shape:
        return values
    ratio = (values.shape[0] / values.shape[1]) / (shape[0] / shape[1])
    if abs(ratio - 1) > PROPORTIONS:
        raise CaseError(
            f"{path}: a mask of {values.shape[0]} x {values.shape[1]} pixels does not belong to a film of "
            f"{shape[0]} x {shape[1]}"
        )
    return shapes.resized(values, *shape)


def _pairs(data) -> list[tuple[Case, tuple]]:
    """Films and masks of the same path in their folders, or else of a name that no other has; whatever the suffix."""
    films, masks = (_listed(folder, which) for folder, which in ((data.images, "images"), (data.masks, "masks")))
    pairs = {path: path for path in films.keys() & masks.keys()}
    film_names, mask_names = _by_name(films), _by_name(masks)
    for path in sorted(films.keys() - masks.keys()):
        name = path.rpartition("/")[2]
        if films.keys() >= set(mask_names.get(name, ())):
            continue  # a film without a mask: those of this name are of films in their own folders
        for paths, files in ((film_names[name], films), (mask_names[name], masks)):
            if len(paths) > 1:
                raise _alike(files[paths[0]], files[paths[1]])
        pairs[path] = mask_names[name][0]
    return [
        (Case(films[film].relative_to(data.images).as_posix(), film), (films[film], masks[mask], None))
        for film, mask in sorted(pairs.items())
    ]


def _listed(folder: str, which: str) -> dict[str, Path]:
    """Files by their path in the folder, without suffix."""
    if not folder or not Path(folder).is_dir():
        raise CaseError(f"config.data.{which}={folder!r} is no folder (or name a table with config.data.csv)")
    found: dict[str, Path] = {}
    for file in pipeline.visible(Path(folder)):
        name = bare(file.relative_to(folder))
        if name in found and images.is_candidate(file) and images.is_candidate(found[name]):
            raise _alike(found[name], file)
        if name not in found or images.is_candidate(file):
            found[name] = file
    return found


def bare(path: Path) -> str:
    """A path without its suffix; the last number of a DICOM identifier is none."""
    return (path if path.suffix[1:].isdigit() else path.with_suffix("")).as_posix()


def _by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        found.setdefault(path.rpartition("/")[2], []).append(path)
    return found


def _alike(one: Path, other: Path) -> CaseError:
    return CaseError(
        f"{one} and {other} have the same name: give films and masks the same folders in config.data.images and "
        ".masks, or say in a table which belongs to which (config.data.csv)"
    )


def _rows(data) -> list[tuple[Case, tuple]]:
    path = Path(data.csv)
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise CaseError(f"config.data.csv={data.csv}: {error.strerror}") from error
    column, _, wanted = data.where.partition("=")
    optional = (data.ignore_column, data.split_column)
    needed = [data.file_column, data.mask_column, data.patient_column, *filter(None, (*optional, column))]
    lacking = [name for name in needed if not rows or name not in rows[0]]
    if lacking:
        have = ", ".join(rows[0]) if rows else "no rows"
        raise CaseError(f"{path}: no column {', '.join(map(repr, lacking))}; the file has {have}")
    kept = [row for row in rows if row[data.mask_column] and (not column or row[column] == wanted)]
    return [(_case(row, data), _files(row, data, path.parent)) for row in kept]


def _case(row: dict, data) -> Case:
    split = row[data.split_column] if data.split_column else ""
    return Case(row[data.file_column], row[data.patient_column], split, row)


def _files(row: dict, data, home: Path) -> tuple[Path, Path, Path | None]:
    ignore = row[data.ignore_column] if data.ignore_column else ""
    film = located(row[data.file_column], data.images, home)
    mask = located(row[data.mask_column], data.masks, home)
    return film, mask, located(ignore, data.masks, home) if ignore else None


def located(name: str, folder: str, home: Path) -> Path:
    """A file by its name in the table: in the given folder, or beside the table."""
    places = [Path(folder) / name, Path(folder) / Path(name).name] if folder else []
    for place in (*places, home / name):
        if place.is_file():
            return place
    raise CaseError(f"{name}: not there (looked for {', '.join(map(str, (*places, home / name)))})")
