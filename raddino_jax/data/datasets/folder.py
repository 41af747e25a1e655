"""Any folder of DICOM, PNG, JPEG, TIFF, WebP or JPEG 2000 files, with or without a table.

Films are told by content. The table (`--csv`) has one row per film: `path` (or `file`), and as far as known
`patient_id` (or `subject_id`), `study_id`, `view`, `split`, `sex`, `age`; label columns are those that `--labels`
names. Nothing else of it, no name and no DICOM tag reaches the prepared data: films are named by the hash of their
pixels, patients by a number.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from raddino_jax.data import images
from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import Film, Manifest, ManifestError

LICENCE = "yours"
OBTAIN = "your own archive"

COLUMNS = {  # ours -> what a table may call it
    "path": ("path", "file", "filename", "image"),
    "patient": ("patient_id", "subject_id", "patient", "subject"),
    "study": ("study_id", "study"),
    "view": ("view", "view_position", "projection"),
    "split": ("split",),
    "sex": ("sex", "gender"),
    "age": ("age",),
}
SPLITS = ("train", "val", "test")


def read(
    raw: Path, *, csv: str = "", labels: str = "", patient_regex: str = "", val: float = 0.0, test: float = 0.0
) -> Manifest:
    """Every file below `raw`, or those that the table names.

    labels: comma-separated columns of the table. patient_regex: its first group (or whole match) in the path below
    `raw` is the patient. val, test: shares of patients held out where the table has no split.
    """
    if labels and not csv:
        raise ManifestError("--labels names columns of a table: give --csv=FILE as well")
    try:
        re.compile(patient_regex)
    except re.error as error:
        raise ManifestError(f"--patient_regex={patient_regex} is no regular expression: {error}") from None
    known = _table(Path(csv), labels) if csv else {}
    found = Manifest(labels=tuple(filter(None, labels.split(","))), pseudonyms=True)
    named = set()
    for path in _files(raw):
        row = known.get(path) or known.get(Path(path).name) or known.get(Path(path).stem)
        if not images.is_candidate(raw / path):
            if not csv or row:  # with a table, files that it does not name are not films
                found.rejects.append((path, _why_not(raw / path)))
        elif csv and row is None:
            found.dropped["not in the table"] += 1
        else:
            named.add(id(row))
            found.films.append(_film(path, row or {}, found.labels, patient_regex, val, test))
    rejected = {name for path, _ in found.rejects for name in (path, Path(path).name, Path(path).stem)}
    missing = [row for row in {id(r): r for r in known.values() if r}.values() if id(row) not in named]
    found.rejects += [(row["path"], "named in the table, not in the folder") for row in missing
                      if row["path"] not in rejected and Path(row["path"]).stem not in rejected]  # fmt: skip
    manifest.refuse_torn_patients(found.films)
    if not csv and not patient_regex:
        found.notes.append("patients unknown (neither --csv nor --patient_regex): every film counts as its own patient")
    return found


def _files(raw: Path) -> Iterator[str]:
    """Paths below `raw` in a fixed order; what begins with a dot is not the archive's."""
    for folder, folders, files in os.walk(raw):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            (Path(folder) / name).relative_to(raw).as_posix() for name in sorted(files) if not name.startswith(".")
        )


def _why_not(path: Path) -> str:
    try:
        images.read(path)
    except images.ImageError as error:
        return str(error)
    return "begins like no image that is known"


def _table(path: Path, labels: str) -> dict[str, dict | None]:
    """Every way the table names a film -> its row; None where a bare name stands for several."""
    rows = list(manifest.rows(path, filter(None, labels.split(","))))
    if not rows:
        raise ManifestError(f"{path}: expected one row per film, found none")
    ours = {name: next((w for w in words if w in rows[0]), None) for name, words in COLUMNS.items()}
    if ours["path"] is None:
        raise ManifestError(f"{path}: expected a column {' or '.join(COLUMNS['path'])}; found {', '.join(rows[0])}")
    known: dict[str, dict | None] = {}
    for row in rows:
        values = [manifest.label(row, name, path.name) for name in filter(None, labels.split(","))]
        row = {name: row[column] for name, column in ours.items() if column} | {"labels": values}
        named = Path(row["path"])
        if named.as_posix() in known:
            raise ManifestError(f"{path}: {row['path']!r} stands there twice")
        known[named.as_posix()] = row
        for name in {named.name, named.stem} - {named.as_posix()}:
            known[name] = None if name in known else row
    return known


def _film(path: str, row: dict, labels, patient_regex: str, val: float, test: float) -> Film:
    patient = row.get("patient") or path
    if patient_regex and "patient" not in row:
        match = re.search(patient_regex, path)
        if match is None:
            raise ManifestError(f"--patient_regex={patient_regex} does not match {path}")
        patient = match[1] if match.groups() else match[0]
    split = row.get("split") or manifest.split_by_patient(patient, val, test)
    split = {"valid": "val", "validation": "val", "validate": "val"}.get(split.lower(), split.lower())
    if split not in SPLITS:
        raise ManifestError(f"{path}: expected a split of {', '.join(SPLITS)}, found {split!r}")
    word = row.get("view", "").strip().upper()
    view = manifest.view(word)
    return Film(
        path, "", patient, study=row.get("study", ""), split=split, view=view,
        projection=word if view in ("frontal", "lateral") else "",  # free text may hold anything
        sex=manifest.sex(row.get("sex", "")), age=manifest.age(row.get("age", "")), pretrain=split == "train",
        labels=row.get("labels", [manifest.NAN] * len(labels)),
    )  # fmt: skip
