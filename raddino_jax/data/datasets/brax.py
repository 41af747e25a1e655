"""BRAX 1.1.0: 24,959 studies of 19,351 patients of a hospital in São Paulo, CheXpert's labels read from the reports.

Layout: master_spreadsheet_update.csv (also seen: master_spreadsheet.csv) beside
Anonymized_DICOMs/id_*/Study_*/Series_*/image-*.dcm and images/...png. Some trees hold the DICOM files without their
suffix. All views are trained on.
"""

from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import CHEXPERT_LABELS, Film, Manifest

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
OBTAIN = "https://physionet.org/content/brax/1.1.0/ (credentialed access)"

PICTURES = {"dicom": "DicomPath", "png": "PngPath"}


def read(raw: Path, *, pictures: str = "dicom") -> Manifest:
    """pictures: dicom (the paper's route: minimum to maximum of the stored values) or png."""
    column = PICTURES[manifest.choice("pictures", pictures, list(PICTURES))]
    table = manifest.find(raw, "master_spreadsheet_update.csv", "master_spreadsheet.csv")
    found = Manifest(labels=CHEXPERT_LABELS)
    for row in manifest.rows(table, [column, "PatientID", "ViewPosition", *CHEXPERT_LABELS]):
        path = row[column].replace("\\", "/").lstrip("/")
        if not (raw / path).exists() and (raw / path).with_suffix("").exists():
            path = path.removesuffix(".dcm")
        found.films.append(Film(
            path, Path(row[column]).stem, row["PatientID"], study=row.get("AccessionNumber", ""),
            view=manifest.view(row["ViewPosition"]), projection=row["ViewPosition"],
            sex=manifest.sex(row.get("PatientSex", "")), age=manifest.age(row.get("PatientAge", "")),
            labels=[manifest.label(row, name, table.name) for name in CHEXPERT_LABELS],
        ))  # fmt: skip
    reason = "Table D.1 prints 41,620, its total needs 41,260; BRAX 1.1.0 has fewer"
    found.compare("films", 41_260, len(found.films), reason)
    return found
