"""ChestX-ray14 (NIH, Wang et al. 2017): 112,120 films of 30,805 patients, 14 findings read from the reports.

Layout: images_001 ... images_012/images/NNNNNNNN_NNN.png (or all in images/), Data_Entry_2017.csv (also: _v2020),
train_val_list.txt, test_list.txt. The header of the table has commas inside two names, and every row ends in one more.
A few hundred files are RGBA. All films are trained on; those of RSNA Pneumonia are among them.
"""

import json
import os
from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import Film, Manifest, ManifestError

LICENCE = "no restrictions; NIH Clinical Center asks to be named"
OBTAIN = "https://nihcc.app.box.com/v/ChestXray-NIHCC (open)"

LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax", "No Finding",
)  # fmt: skip
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")


def read(raw: Path, *, without_rsna: str = "") -> Manifest:
    """without_rsna: RSNA's mapping (pneumonia-challenge-dataset-mappings_2018.json), whose films are held out."""
    table = manifest.find(raw, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    places, splits = _places(raw), _splits(raw)
    rsna = rsna_films(Path(without_rsna)) if without_rsna else {}
    found = Manifest(labels=LABELS)
    for row in manifest.rows(table, COLUMNS):
        name = row["Image Index"]
        if name not in places:
            found.rejects.append((name, "named in the table, in none of the folders"))
            continue
        findings = row["Finding Labels"].split("|")
        if unknown := set(findings) - set(LABELS):
            raise ManifestError(f"{table.name}: {name} has the unknown finding {unknown.pop()!r}")
        found.films.append(Film(
            places[name], Path(name).stem, row["Patient ID"].zfill(8), split=splits.get(name, "train"),
            view=manifest.view(row["View Position"]), projection=row["View Position"],
            sex=manifest.sex(row["Patient Gender"]), age=manifest.age(row["Patient Age"]), pretrain=name not in rsna,
            labels=[float(label in findings) for label in LABELS],
        ))  # fmt: skip
    if not splits:
        found.notes.append("no train_val_list.txt and test_list.txt: every film is in train")
    shared = sum(film.id + ".png" in rsna for film in found.films)
    found.notes.append(
        f"{shared:,} films that RSNA Pneumonia uses are kept out of pre-training" if rsna else
        "26,684 of these films are those of RSNA Pneumonia: pre-training sees them, unlabelled (--without_rsna=FILE)"
    )  # fmt: skip
    found.compare("films", 112_120, len(found.films), "files of the distribution that are not there")
    return found


def rsna_films(path: Path) -> dict[str, str]:
    """RSNA's mapping: file name here -> patientId there. Raises ManifestError."""
    try:
        return {row["img_id"]: row["subset_img_id"] for row in json.loads(path.read_text())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path}: expected RSNA's mapping, a JSON list with img_id and subset_img_id") from error


def _places(raw: Path) -> dict[str, str]:
    """File name -> path below `raw`."""
    patterns = ("images_*/images", "images_[0-9]*", "images")
    folders = [folder for pattern in patterns for folder in sorted(raw.glob(pattern))]
    if not folders:
        raise ManifestError(f"{raw} holds neither images_001 ... images_012 nor images: give the unpacked download")
    found = {}
    for folder in folders:
        for name in os.listdir(folder):
            if name.endswith(".png"):
                found.setdefault(name, (folder / name).relative_to(raw).as_posix())
    return found


def _splits(raw: Path) -> dict[str, str]:
    lists = {"train_val_list.txt": "train", "test_list.txt": "test"}
    return {
        name.strip(): split
        for file, split in lists.items()
        if (raw / file).exists()
        for name in (raw / file).read_text().split()
    }
