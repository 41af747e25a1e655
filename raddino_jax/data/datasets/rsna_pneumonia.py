"""RSNA Pneumonia Detection Challenge (stage 2): 26,684 frontal films of ChestX-ray14 with boxes around opacities.

Layout: stage_2_train_images/UUID.dcm (8-bit JPEG inside), stage_2_train_labels.csv with one row per box (30,227 rows),
stage_2_detailed_class_info.csv. Test films of the challenge have no labels. A film's patient is known through RSNA's
mapping to ChestX-ray14 only.
"""

from collections import defaultdict
from pathlib import Path

from raddino_jax.data.datasets import chestx_ray14, manifest
from raddino_jax.data.datasets.manifest import NAN, Film, Manifest

LICENCE = "Kaggle competition rules; films as ChestX-ray14"
OBTAIN = "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge"


def read(raw: Path, *, mapping: str = "", val: float = 0.2, test: float = 0.2) -> Manifest:
    """mapping: pneumonia-challenge-dataset-mappings_2018.json, for patients. val, test: shares (paper: 60/20/20)."""
    patients = {}
    if mapping:
        patients = {there: here.partition("_")[0] for here, there in chestx_ray14.rsna_films(Path(mapping)).items()}
    boxes = defaultdict(list)
    columns = ("patientId", "x", "y", "width", "height", "Target")
    for row in manifest.rows(manifest.find(raw, "stage_2_train_labels.csv"), columns):
        found = boxes[row["patientId"]]
        if row["Target"] == "1":
            x, y, width, height = (float(row[name]) for name in ("x", "y", "width", "height"))
            found.append(("box", x, y, x + width, y + height))
    classes = {}
    if (raw / "stage_2_detailed_class_info.csv").exists():
        table = manifest.rows(raw / "stage_2_detailed_class_info.csv", ["patientId", "class"])
        classes = {row["patientId"]: row["class"] for row in table}
    found = Manifest(labels=("Pneumonia", "Normal"), masks=("opacity",))
    for name, drawn in boxes.items():
        patient = patients.get(name, name)
        normal = float(classes[name] == "Normal") if name in classes else NAN
        found.films.append(Film(
            f"stage_2_train_images/{name}.dcm", name, patient, split=manifest.split_by_patient(patient, val, test),
            view="frontal", pretrain=False, labels=[float(bool(drawn)), normal], masks=[("union", [_NOTHING, *drawn])],
        ))  # fmt: skip
    if not mapping:
        found.notes.append("patients unknown without --mapping=FILE: every film counts as its own patient")
    found.compare("films", 26_684, len(found.films), "the table is not the whole one")
    found.compare("films of test", 5_337, sum(film.split == "test" for film in found.films), "another draw")
    return found


_NOTHING = ("box", 0, 0, 0, 0)
