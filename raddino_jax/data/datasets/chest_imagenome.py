"""Chest ImaGenome 1.0.0 (Wu et al. 2021): boxes around lung zones of MIMIC-CXR films, cut to the lungs (paper, C.2).

Layout: silver_dataset/scene_graph.zip (or unpacked, scene_graph/) with DICOM_ID_SceneGraph.json, whose `objects` have
bbox_name and original_x1 ... in pixels of the film (x1 ... belong to a frame of 224); silver_dataset/splits/
{train,valid,test}.csv and images_to_avoid.csv. A zone is its box within the lung of that side; boxes overlap a little.
The lungs are those of `mimic_lungs`, so only its films are prepared. A zone without box counts as not annotated.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from raddino_jax.data.datasets import manifest, mimic_cxr, mimic_lungs
from raddino_jax.data.datasets.manifest import Manifest, ManifestError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
OBTAIN = "https://physionet.org/content/chest-imagenome/1.0.0/ (credentialed access), MIMIC-CXR and its lung masks"

ZONES = tuple(f"{side} {height} lung zone" for side in ("right", "left") for height in ("upper", "mid", "lower"))


def read(
    raw: Path, *, mimic_cxr_dir: str = "", lungs_dir: str = "", lungs: str = "lung", val: float = 0.15,
    test: float = 0.15,
) -> Manifest:  # fmt: skip
    """mimic_cxr_dir, lungs_dir: raw folders of MIMIC-CXR and of `mimic_lungs`; lungs, val, test as there."""
    films = mimic_cxr.records(manifest.other_tree("mimic_cxr_dir", mimic_cxr_dir, "MIMIC-CXR as distributed"))
    pictures = mimic_lungs.pictures(manifest.other_tree("lungs_dir", lungs_dir, "lung-segment-mimic-cxr"), lungs)
    silver = manifest.find(raw, "silver_dataset")
    listed = silver / "splits" / "images_to_avoid.csv"
    avoid = manifest.listed(listed) if listed.exists() else set()
    found, graph = Manifest(masks=ZONES), _graphs(silver)
    for name, picture in pictures.items():
        objects = graph(name)
        if name not in films or objects is None:
            found.dropped["lungs without film or scene graph"] += 1
        elif name in avoid:
            found.dropped["listed in images_to_avoid.csv"] += 1
        else:
            film = films[name]
            film.split = manifest.split_by_patient(film.patient, val, test)
            film.masks = [_zone(objects, zone, picture) for zone in ZONES]
            found.films.append(film)
    return found


def _graphs(silver: Path) -> Callable[[str], list[dict] | None]:
    """dicom_id -> objects of its scene graph, None without one."""
    folder = silver / "scene_graph"
    if folder.is_dir():
        def read(name):
            path = folder / f"{name}_SceneGraph.json"
            return json.loads(path.read_text())["objects"] if path.exists() else None
    else:
        archive = zipfile.ZipFile(manifest.find(silver, "scene_graph.zip"))
        members = {Path(member).name: member for member in archive.namelist()}

        def read(name):
            member = members.get(f"{name}_SceneGraph.json")
            return json.loads(archive.read(member))["objects"] if member else None

    return read


def _zone(objects: list[dict], zone: str, picture: Path) -> tuple | None:
    boxes = [thing for thing in objects if thing["bbox_name"] == zone]
    if not boxes:
        return None
    try:
        box = [boxes[0][f"original_{corner}"] for corner in ("x1", "y1", "x2", "y2")]
    except KeyError as error:
        raise ManifestError(f"scene graph: {zone} has no {error.args[0]}") from None
    return ("both", [("lung", str(picture), zone.partition(" ")[0]), ("box", *box)])
