"""VinDr-RibCXR (Nguyen et al. 2021): 245 frontal films with outlines of ribs 1 to 10 on either side.

Layout: data/{train,val}/img/VinDr_RibCXR_{train,val}_NNN.png and Vindr_RibCXR_{train,val}_mask.json (in data/ or beside
it): {"img": {"0": path}, "R1": {"0": [{"x", "y"}, ...] or "None"}, ... "L10"}. The official val is the paper's test;
15 % of train become val. A rib without outline counts as not annotated.
"""

import json
from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import Film, Manifest, ManifestError

LICENCE = "VinDr data use agreement"
OBTAIN = "https://vindr.ai/datasets/ribcxr (agreement)"

RIBS = tuple(f"{side}{number}" for side in "RL" for number in range(1, 11))


def read(raw: Path, *, val: float = 0.15) -> Manifest:
    """val: share of the official train set that becomes val."""
    found = Manifest(masks=RIBS)
    for official, films in (("train", 196), ("val", 49)):
        name = f"Vindr_RibCXR_{official}_mask.json"
        path = manifest.find(raw, name, f"data/{name}", f"data/{official}/{name}")
        table = json.loads(path.read_text())
        lacking = [column for column in ("img", *RIBS) if column not in table]
        if lacking:
            raise ManifestError(f"{path.name}: expected img, R1 ... R10, L1 ... L10; {lacking[0]} is missing")
        for key, image in table["img"].items():
            name = Path(image).name
            split = "test" if official == "val" else manifest.split_by_patient(name, val, 0)
            found.films.append(Film(
                f"data/{official}/img/{name}", Path(name).stem, Path(name).stem, split=split, view="frontal",
                pretrain=False, masks=[_rib(table[rib].get(key)) for rib in RIBS],
            ))  # fmt: skip
        found.compare(f"films of {official}", films, len(table["img"]), "the table is not the whole one")
    return found


def _rib(points) -> tuple | None:
    if not points or points == "None":
        return None
    return ("polygon", [[point["x"], point["y"]] for point in points])
