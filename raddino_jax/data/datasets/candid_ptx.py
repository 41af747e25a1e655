"""CANDID-PTX (Feng et al. 2021): 19,237 films of Dunedin with outlines of pneumothorax, chest tubes and rib fractures.

Layout: dataset/SOPInstanceUID (DICOM without suffix, 1024 x 1024), Pneumothorax_reports.csv, chest_tube.csv,
acute_rib_fracture.csv (also: Rib_fracture_mask_rle.csv). One row per outline: those of a film are united. Outlines are
runs of (gap, length) down the columns; "-1" means none, an empty cell says nothing. The patient is the part of
`filename` before the first "_"; films that the tables give to several patients are left out.
"""

from collections import defaultdict
from pathlib import Path

from raddino_jax.data import shapes
from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import NAN, Film, Manifest, ManifestError

LICENCE = "CANDID-PTX data use agreement"
OBTAIN = "https://doi.org/10.17608/k6.auckland.14173982 (ethics course and agreement)"

STRUCTURES = ("pneumothorax", "chest tube", "rib fracture")
SIDE = 1024


def read(raw: Path, *, val: float = 0.2, test: float = 0.2) -> Manifest:
    """val, test: shares of patients; the paper splits 60/20/20 by patient, anew for each seed."""
    reports = manifest.find(raw, "Pneumothorax_reports.csv")
    outlines = [
        _outlines(reports, "SOPInstanceUID", "EncodedPixels"),
        _outlines(manifest.find(raw, "chest_tube.csv"), "anon_SOPUID", "mask_rle"),
        _outlines(manifest.find(raw, "acute_rib_fracture.csv", "Rib_fracture_mask_rle.csv"), "anon_SOPUID", "mask_rle"),
    ]
    patients, studies = defaultdict(set), {}
    for row in manifest.rows(reports, ["SOPInstanceUID", "StudyInstanceUID", "filename"]):
        patients[row["SOPInstanceUID"]].add(row["filename"].partition("_")[0])
        studies[row["SOPInstanceUID"]] = row["StudyInstanceUID"]
    found = Manifest(labels=STRUCTURES, masks=STRUCTURES)
    for film, names in patients.items():
        if len(names) > 1:
            found.dropped["given to several patients"] += 1
            continue
        (patient,) = names
        drawn = [_drawn(outlines[0].get(film), listed=False), *(_drawn(o.get(film), listed=True) for o in outlines[1:])]
        found.films.append(Film(
            f"dataset/{film}", film, patient, study=studies[film], split=manifest.split_by_patient(patient, val, test),
            view="frontal", pretrain=False, labels=[label for label, _ in drawn], masks=[mask for _, mask in drawn],
        ))  # fmt: skip
    found.compare("films of test", 3_833, sum(film.split == "test" for film in found.films), "another draw of patients")
    return found


def _outlines(table: Path, film: str, runs: str) -> dict[str, list[str]]:
    """film -> cells with its outlines."""
    found = defaultdict(list)
    for row in manifest.rows(table, [film, runs]):
        found[row[film]].append(row[runs])
    return found


def _drawn(cells: list[str] | None, listed: bool) -> tuple[float, tuple | None]:
    """(label, mask) of a structure. listed: a film that the table does not name lacks the structure."""
    cells = cells if cells or not listed else ["-1"]
    try:
        runs = [parsed for cell in cells if cell.lower() != "nan" and (parsed := shapes.parse_runs(cell))]
    except ValueError as error:
        raise ManifestError(f"an outline of CANDID-PTX cannot be read: {error}") from None
    if runs:
        return 1.0, ("union", [("runs", one, SIDE, SIDE) for one in runs])
    if "-1" in cells:
        return 0.0, ("runs", [], SIDE, SIDE)
    return NAN, None
