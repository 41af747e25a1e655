"""What is known about the films of a source: labels with gaps, and which patient each film is of.

A CSV has one row per film: a column that names the file, one that names the patient, and label columns with 0, 1 or
nothing (not assessed: masked, never read as 0).
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VALUES = {"": np.nan, "0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}


class LabelError(ValueError):
    """A table that cannot be used; the message names row and column."""


@dataclass(frozen=True)
class Labels:
    """names [C]; values float32 [n, C], NaN where not assessed; patients str [n]; films int [n], in the source."""

    names: tuple[str, ...]
    values: np.ndarray
    patients: np.ndarray
    films: np.ndarray

    def __len__(self) -> int:
        return len(self.films)

    def take(self, index: np.ndarray) -> "Labels":
        """The rows of an index or a mask."""
        return Labels(self.names, self.values[index], self.patients[index], self.films[index])

    def informative(self) -> "Labels":
        """The labels of which both classes occur."""
        keep = np.array([len(np.unique(column[~np.isnan(column)])) > 1 for column in self.values.T], bool)
        names = tuple(name for name, kept in zip(self.names, keep, strict=True) if kept)
        return Labels(names, self.values[:, keep], self.patients, self.films)


def read_csv(
    path: str, files: Sequence[Path], columns: Sequence[str], file_column: str, patient_column: str, where: str = ""
) -> Labels:
    """Labels of a folder's films from a CSV.

    files: the source's films in order; the file column holds a path or a name, with or without suffix.
    where: "column=value" keeps only those rows, e.g. one source of a mixed sample.
    Raises LabelError: missing column, unknown value, a film named twice or not there, a label with one value only.
    """
    rows = read_rows(path, [file_column, patient_column, *columns], where)
    films = _films(path, rows, files, file_column)
    values = [[_value(path, number, row[name], name) for name in columns] for number, row in rows]
    patients = np.array([row[patient_column] for _, row in rows])
    _refuse_nobody(path, rows, patient_column)
    found = Labels(tuple(columns), np.array(values, np.float32), patients, np.array(films))
    _refuse_constant(path, found)
    return found


def read_column(
    path: str, files: Sequence[Path], column: str, file_column: str, where: str = "", films: np.ndarray | None = None
) -> np.ndarray:
    """What a column says of each film, as words without outer blanks: view, sex, age, group; "" where it says nothing.

    The other arguments are those of `read_csv`. In the order of the table's rows, as `read_csv` has it; or of `films`,
    places in `files` (Labels.films). Raises LabelError: missing column, a film named twice, not there or without a row.
    """
    rows = read_rows(path, [file_column, column], where)
    found = dict(zip(_films(path, rows, files, file_column), (row[column].strip() for _, row in rows), strict=True))
    if films is None:
        return np.array(list(found.values()))
    if lacking := [files[film].name for film in films if film not in found]:
        raise LabelError(f"{path}, column {column!r}: no row for film {lacking[0]!r} ({len(lacking)} films have none)")
    return np.array([found[film] for film in films])


def read_rows(path: str, needed: Sequence[str], where: str) -> list[tuple[int, dict]]:
    """(row number as a spreadsheet shows it, row) of those that `where` keeps. Raises LabelError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = list(enumerate(csv.DictReader(handle), start=2))
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(f"{path}: expected a CSV, could not read it: {error}") from None
    column, _, wanted = where.partition("=")
    have = list(rows[0][1]) if rows else []
    if lacking := [name for name in [*needed, *filter(None, [column])] if name not in have]:
        there = ", ".join(map(str, have)) or "no rows"
        raise LabelError(f"{path}: no column {', '.join(map(repr, lacking))}; the file has {there}")
    for number, row in rows:
        if short := [name for name in needed if row[name] is None]:
            raise LabelError(f"{path}, row {number}, column {short[0]!r}: the row ends before it")
    rows = [(number, row) for number, row in rows if not where or row[column] == wanted]
    if not rows:
        raise LabelError(f"{path}: no row has {where}")
    return rows


def _films(path: str, rows, files: Sequence[Path], file_column: str) -> list[int]:
    """The place in `files` of each row's film."""
    place = _places(files)
    films = [_film(path, number, row[file_column], file_column, place) for number, row in rows]
    _refuse_twice(path, rows, films, file_column)
    return films


def _refuse_nobody(path, rows, column) -> None:
    """A film of nobody cannot be kept on one side of a split."""
    for number, row in rows:
        if not row[column].strip():
            raise LabelError(f"{path}, row {number}, column {column!r}: empty, but splits are by patient")


def _places(files: Sequence[Path]) -> dict[str, int | None]:
    """Every way a CSV may name a film -> its index; None where the name is ambiguous."""
    place: dict[str, int | None] = {}
    for index, file in enumerate(files):
        for name in (file.name, file.stem):
            place[name] = None if name in place and place[name] != index else index
    return place


def _film(path, number, name, column, place) -> int:
    index = place.get(Path(name).name, -1)
    if index == -1:
        raise LabelError(f"{path}, row {number}: no film {name!r} in the folder (column {column!r})")
    if index is None:
        raise LabelError(f"{path}, row {number}: {name!r} names several films of the folder (column {column!r})")
    return index


def _value(path, number, text, name) -> float:
    try:
        return VALUES[text.strip()]
    except KeyError:
        raise LabelError(f"{path}, row {number}, column {name!r}: {text!r} is not 0, 1 or empty") from None


def _refuse_twice(path, rows, films, column) -> None:
    first: dict[int, int] = {}
    for (number, row), film in zip(rows, films, strict=True):
        if film in first:
            there = f"{row[column]!r} stands in row {first[film]} already"
            raise LabelError(f"{path}, row {number}, column {column!r}: {there}")
        first[film] = number


def _refuse_constant(path, labels: Labels) -> None:
    for name, column in zip(labels.names, labels.values.T, strict=True):
        if len(np.unique(column[~np.isnan(column)])) < 2:
            raise LabelError(f"{path}, column {name!r}: one class only among its {len(labels)} rows, nothing to score")
