"""IU X-ray / Open-i (Demner-Fushman et al. 2016): 7,470 films with 3,955 reports of Indiana University.

Layout of Open-i: NLMCXR_png/CXR*.png, ecgen-radiology/UID.xml. Layout of Kaggle: indiana_reports.csv,
indiana_projections.csv, images/images_normalized/*.png. Only the latter says which films are frontal; if it lies beside
the XML files, its projections are used with them. Removed names stand as XXXX in the texts.
"""

from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import Film, Manifest
from raddino_jax.data.reports import TEXTS, read_xml

LICENCE = "CC BY-NC-ND 4.0 (Open-i)"
OBTAIN = "https://openi.nlm.nih.gov/faq (NLMCXR_png.tgz and NLMCXR_reports.tgz, open)"



def read(raw: Path) -> Manifest:
    """Every film with its report; `first_frontal` marks the one film per report that the paper's pairs are made of."""
    folder = manifest.find(raw, "NLMCXR_png", "images/images_normalized", "images", "png").relative_to(raw)
    projections = _projections(raw)
    reports = _xml_reports(raw) if (raw / "ecgen-radiology").is_dir() else _csv_reports(raw, projections)
    found = Manifest(more=dict.fromkeys(TEXTS, str) | {"first_frontal": float})
    pairs = without = 0
    for uid, (texts, names) in reports.items():
        first = next((name for name in names if projections.get(name) == "Frontal"), None)
        pairs += bool(first and texts["findings"])
        without += not names
        for name in names:
            projection = projections.get(name, "")
            found.films.append(Film(
                (folder / name).as_posix(), Path(name).stem, uid, study=uid, split="test",
                view=manifest.view(projection), projection=projection, pretrain=False,
                more=[*(texts[kind] for kind in TEXTS), float(name == first)],
            ))  # fmt: skip
    found.dropped["reports without a film"] = without
    reason = "which ones the paper lacks is unpublished" if projections else "no table says which films are frontal"
    found.compare("pairs of a frontal film and findings", 3_306, pairs, reason)
    return found


def _projections(raw: Path) -> dict[str, str]:
    """File name -> Frontal or Lateral; empty without the table."""
    path = raw / "indiana_projections.csv"
    if not path.exists():
        return {}
    return {row["filename"]: row["projection"] for row in manifest.rows(path, ["uid", "filename", "projection"])}


def _csv_reports(raw: Path, projections: dict) -> dict[str, tuple[dict, list[str]]]:
    names: dict[str, list[str]] = {}
    for row in manifest.rows(manifest.find(raw, "indiana_projections.csv"), ["uid", "filename"]):
        names.setdefault(row["uid"], []).append(row["filename"])
    table = manifest.rows(manifest.find(raw, "indiana_reports.csv"), ["uid", *TEXTS])
    return {row["uid"]: ({kind: row[kind] for kind in TEXTS}, names.get(row["uid"], [])) for row in table}


def _xml_reports(raw: Path) -> dict[str, tuple[dict, list[str]]]:
    """uid -> (texts, file names). Kaggle's table writes a file name with .dcm.png where Open-i's has .png."""
    found = {}
    for path in sorted((raw / "ecgen-radiology").glob("*.xml"), key=lambda path: (len(path.stem), path.stem)):
        texts, films = read_xml(path)
        found[path.stem] = texts, [f"{film}.png" for film in films]
    return found
