"""What every dataset builder hands over: one `Film` per picture, and why some are left out.

A builder is a module with `LICENCE`, `OBTAIN` and `read(raw, *, option=default, ...) -> Manifest`: it reads the tables
of a raw tree as distributed, never a pixel. Labels are 1 (present), 0 (absent), -1 (uncertain) or NaN (not assessed),
as the dataset says; what to do about the last two is for those who train on them.
"""

import csv
import gzip
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAN = math.nan
LABEL_VALUES = {"": NAN, "nan": NAN, "1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0}
VIEWS = {
    "frontal": ("AP", "PA", "AP_HORIZONTAL", "FRONTAL", "ANTERO-POSTERIOR", "POSTERO-ANTERIOR"),
    "lateral": ("L", "LL", "RL", "LATERAL", "LEFT LATERAL", "RIGHT LATERAL"),
    "unknown": ("", "NAN", "UNKNOWN"),
}
CHEXPERT_LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip


class ManifestError(ValueError):
    """A raw tree or an option that cannot be used; the message says what was expected and what to do."""


@dataclass(slots=True)
class Film:
    """One picture and what may be kept of what is known about it.

    path: below the raw folder, or absolute; never written out. id: "" stands for the hash of the pixels.
    view: frontal, lateral, other or unknown; projection: the dataset's own word for it. pretrain: whether the film
    belongs to the part that encoders are trained on. masks: shapes (see `shapes`) by the names of the manifest, None
    where not annotated. more: values of the manifest's further columns. negative: black and white are exchanged.
    """

    path: str
    id: str
    patient: str
    study: str = ""
    split: str = "train"
    view: str = "unknown"
    projection: str = ""
    sex: str = ""
    age: float = NAN
    pretrain: bool = True
    labels: Sequence[float] = ()
    masks: Sequence = ()
    more: Sequence = ()
    negative: bool = False


@dataclass
class Manifest:
    """Films of a raw tree.

    labels, masks: names; more: further columns, name -> str or float. rejects: (path, reason) of films that the tables
    name and that cannot be used. dropped: how many were left out on purpose, by reason. paper: counts that
    arXiv 2401.10815 reports beside ours. pseudonyms: patients and films get new names.
    """

    films: list[Film] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    more: dict[str, type] = field(default_factory=dict)
    rejects: list[tuple[str, str]] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    paper: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pseudonyms: bool = False

    def compare(self, what: str, paper: int, ours: int, reason: str = "") -> None:
        """Set a count of the paper beside ours, with the reason where they differ."""
        self.paper.append({"what": what, "paper": paper, "ours": ours, "reason": reason if paper != ours else ""})


def find(raw: Path, *names: str) -> Path:
    """The first of several files or folders that is there. Raises ManifestError that lists them."""
    for name in names:
        if (raw / name).exists():
            return raw / name
    raise ManifestError(f"{raw} holds no {' or '.join(names)}; --raw_dir is the folder as distributed, unpacked")


def rows(path: Path, needed: Iterable[str] = ()) -> Iterator[dict[str, str]]:
    """Rows of a CSV, gzipped or not, as dicts of stripped strings. Raises ManifestError for a missing column."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = [name.strip() for name in reader.fieldnames or ()]
        lacking = [name for name in needed if name not in names]
        if lacking:
            raise ManifestError(f"{path.name}: expected a column {', '.join(lacking)}; found {', '.join(names)}")
        reader.fieldnames = names
        for row in reader:
            yield {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)}


def label(row: dict, name: str, table: str) -> float:
    """1, 0, -1 or NaN. Raises ManifestError for anything else."""
    try:
        return LABEL_VALUES[row[name].lower()]
    except KeyError:
        raise ManifestError(f"{table}, column {name!r}: expected 1, 0, -1 or nothing, found {row[name]!r}") from None


def number(text: str) -> float:
    """A number that may be missing; NaN then."""
    try:
        return float(text)
    except ValueError:
        return NAN


def age(text: str) -> float:
    """Years from "45", "045Y" or "45.0"; months and days ("018M") become parts of a year.

    NaN for nothing, for 0 (several sets write it for unknown) and beyond 120 (ChestX-ray14 has patients of 412).
    """
    text = text.strip().upper()
    unit = {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}.get(text[-1:], 0)
    years = number(text[:-1] if unit else text) / (unit or 1)
    return years if 0 < years <= 120 else NAN


def sex(text: str) -> str:
    """"F", "M" or "" from any spelling."""
    first = text.strip().upper()[:1]
    return first if first in ("F", "M") else ""


def view(projection: str) -> str:
    """frontal, lateral, other or unknown from a dataset's word for the projection."""
    word = projection.strip().upper()
    return next((name for name, words in VIEWS.items() if word in words), "other")


def share(key: str, salt: str = "") -> float:
    """A number in [0, 1) that belongs to a patient or a film for good: splits that need no list."""
    digest = hashlib.sha256(f"{salt}/{key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_by_patient(patient: str, val: float, test: float) -> str:
    """train, val or test, all films of a patient alike."""
    place = share(patient, "split")
    return "test" if place < test else "val" if place < test + val else "train"


def listed(path: str | Path) -> set[str]:
    """Names in a list of films: cells of a text file or CSV; of a path also its stem, alone and with two folders."""
    names = set()
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        for row in csv.reader(file):
            for cell in row:
                path = Path(cell.strip())
                names.update((cell.strip(), path.stem, "_".join((*path.parts[-3:-1], path.stem))))
    return names - {""}


def choice(option: str, value: str, allowed: Sequence[str]) -> str:
    """The value of an option. Raises ManifestError that lists what it may be."""
    if value not in allowed:
        raise ManifestError(f"--{option}={value}: expected {' or '.join(allowed)}")
    return value


def other_tree(option: str, value: str, what: str) -> Path:
    """A second raw folder that an option names. Raises ManifestError when it is not there."""
    if not value or not Path(value).is_dir():
        raise ManifestError(f"--{option}={value}: expected the folder of {what}")
    return Path(value).resolve()


def refuse_torn_patients(films: Sequence[Film]) -> None:
    """Raises ManifestError where the films of one patient lie in several splits."""
    place: dict[str, str] = {}
    for film in films:
        if place.setdefault(film.patient, film.split) != film.split:
            raise ManifestError(
                f"the films of one patient are in the splits {place[film.patient]!r} and {film.split!r} "
                f"({film.path} is one of them): give each patient one split"
            )
