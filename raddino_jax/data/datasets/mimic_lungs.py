"""Lung masks of MIMIC-CXR films (PhysioNet, lung-segment-mimic-cxr 1.0.0): 1,141 films, outlined by a network and
looked through by hand. The paper uses 1,138.

Each film comes as two pictures, its lungs and the rest, named after the film's dicom_id; folders and format are not
documented, so every picture whose name holds a dicom_id counts, and `--lungs` tells the lungs among them. Plain binary
masks do as well. The films themselves are those of MIMIC-CXR (`--mimic_cxr_dir`).
"""

import re
from collections import defaultdict
from pathlib import Path

from raddino_jax.data.datasets import manifest, mimic_cxr
from raddino_jax.data.datasets.manifest import Film, Manifest, ManifestError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
OBTAIN = "https://physionet.org/content/lung-segment-mimic-cxr/1.0.0/ (credentialed access), and MIMIC-CXR"

SIDES = ("right", "left")
DICOM_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def read(raw: Path, *, mimic_cxr_dir: str = "", lungs: str = "lung", val: float = 0.15, test: float = 0.15) -> Manifest:
    """mimic_cxr_dir: raw folder of MIMIC-CXR. lungs: what the path of a picture of lungs holds, where there are two.

    val, test: shares of patients (the paper: 70/15/15).
    """
    films = mimic_cxr.records(manifest.other_tree("mimic_cxr_dir", mimic_cxr_dir, "MIMIC-CXR as distributed"))
    found = Manifest(masks=("right lung", "left lung"))
    for name, picture in pictures(raw, lungs).items():
        if name not in films:
            found.rejects.append((picture.relative_to(raw).as_posix(), "MIMIC-CXR's tables do not name this film"))
            continue
        film: Film = films[name]
        film.split = manifest.split_by_patient(film.patient, val, test)
        film.masks = [("lung", str(picture), side) for side in SIDES]
        found.films.append(film)
    found.compare("films", 1_138, len(found.films), "1,141 are distributed; which three the paper lacks is unpublished")
    return found


def pictures(raw: Path, lungs: str) -> dict[str, Path]:
    """dicom_id -> picture of its lungs. Raises ManifestError where `lungs` does not single one out."""
    candidates = defaultdict(list)
    for path in sorted(raw.resolve().rglob("*")):
        match = DICOM_ID.search(path.name)
        if match and path.suffix.lower() in PICTURES:
            candidates[match[0]].append(path)
    found = {}
    for name, paths in candidates.items():
        chosen = paths if len(paths) == 1 else [p for p in paths if lungs in p.relative_to(raw.resolve()).as_posix()]
        if len(chosen) != 1:
            raise ManifestError(
                f"expected one picture of the lungs of {name}, found {len(chosen)} of {len(paths)} whose path holds "
                f"{lungs!r} ({', '.join(p.name for p in paths)}): --lungs=WORD tells them apart"
            )
        found[name] = chosen[0]
    return found
