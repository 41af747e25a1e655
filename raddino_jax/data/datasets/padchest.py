"""PadChest (Bustos et al. 2020): 160,861 films of 67,625 patients of Alicante, 174 findings.

Layout: [images/]ImageDir/ImageID, 16-bit PNG of which often 12 bits are used, beside
PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv[.gz]. `Labels` is a Python list whose entries may begin with a
blank; 103 rows have none. About 20 files of the distribution are missing or cut off: they are found by decoding.

The lateral probe of the paper (C.3) holds out studies: lateral films with one of `LATERAL_PROBE`, and as many without.
"""

import ast
from collections import Counter
from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import NAN, Film, Manifest, ManifestError

LICENCE = "PadChest Dataset Research Use Agreement"
OBTAIN = "https://bimcv.cipf.es/bimcv-projects/padchest/ (registration)"

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "PhotometricInterpretation_DICOM", "Labels")
LATERAL_PROBE = ("vertebral degenerative changes", "pleural effusion", "costophrenic angle blunting")


def read(raw: Path, *, min_films: int = 100, monochrome1: str = "invert") -> Manifest:
    """min_films: labels on fewer films get no column (the lateral probe's always do).

    monochrome1: invert or keep the films whose DICOM said MONOCHROME1; nothing in the distribution says whether its PNG
    are inverted already, so look at a few.
    """
    manifest.choice("monochrome1", monochrome1, ("invert", "keep"))
    table = manifest.find(raw, TABLE, f"{TABLE}.gz")
    base = "images/" if (raw / "images").is_dir() else ""
    rows = [row | {"labels": _labels(row["Labels"], row["ImageID"])} for row in manifest.rows(table, COLUMNS)]
    counts = Counter(label for row in rows for label in set(row["labels"] or ()))
    names = sorted({*LATERAL_PROBE, *(name for name, count in counts.items() if count >= min_films)} - {"", "exclude"})
    found = Manifest(labels=tuple(names), more={"lateral_probe": float})
    for row in rows:
        if row["Projection"] == "EXCLUDE" or "exclude" in (row["labels"] or ()):
            found.dropped["marked to exclude by the dataset"] += 1
        else:
            found.films.append(_film(base, row, names, monochrome1))
    _hold_out(found.films, names)
    if inverted := sum(film.negative for film in found.films):
        found.notes.append(f"{inverted:,} films said MONOCHROME1 and are inverted; look at some of them")
    found.compare("films", 160_817, len(found.films), "44 fewer than the table's 160,861; which ones is unpublished")
    found.compare("films for pre-training (the release)", 136_787, sum(film.pretrain for film in found.films),
                  "the release's selection is unpublished")  # fmt: skip
    return found


def _labels(text: str, name: str) -> list[str] | None:
    if text.lower() in ("", "nan"):
        return None
    try:
        return [str(label).strip() for label in ast.literal_eval(text)]
    except (ValueError, SyntaxError):
        raise ManifestError(f"{TABLE}: {name} has labels that are no list: {text[:60]!r}") from None


def _film(base: str, row: dict, names: list[str], monochrome1: str) -> Film:
    listed = row["labels"]
    born = manifest.number(row.get("PatientBirth", ""))
    year = manifest.number(row.get("StudyDate_DICOM", "")[:4])
    return Film(
        f"{base}{row['ImageDir']}/{row['ImageID']}", Path(row["ImageID"]).stem, row["PatientID"], study=row["StudyID"],
        view=manifest.view(row["Projection"]), projection=row["Projection"],
        sex=manifest.sex(row.get("PatientSex_DICOM", "")), age=manifest.age(str(year - born)), more=[0.0],
        labels=[NAN] * len(names) if listed is None else [float(name in listed) for name in names],
        negative=monochrome1 == "invert" and row["PhotometricInterpretation_DICOM"] == "MONOCHROME1",
    )  # fmt: skip


def _hold_out(films: list[Film], names: list[str]) -> None:
    """Mark the lateral probe's films and keep their studies out of pre-training."""
    lateral = [film for film in films if film.view == "lateral" and film.labels[0] == film.labels[0]]
    lateral.sort(key=lambda film: manifest.share(film.id, "lateral probe"))
    held = set()
    for name in LATERAL_PROBE:
        column = names.index(name)
        positive = [film for film in lateral if film.labels[column] == 1]
        negative = [film for film in lateral if film.labels[column] == 0]
        held.update(film.id for film in positive + negative[: len(positive)])
    studies = {film.study for film in films if film.id in held}
    for film in films:
        film.more = [float(film.id in held)]
        film.pretrain = film.study not in studies
