"""MIMIC-CXR 2.0.0 / 2.1.0 (Johnson et al. 2019): 377,110 films of 65,379 patients of Boston.

Layout: files/pNN/pSUBJECT/sSTUDY/DICOM_ID.dcm (MIMIC-CXR) or .jpg (MIMIC-CXR-JPG). The tables come with MIMIC-CXR-JPG:
mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz. The JPEGs were equalised by histogram, so grey values and the
statistics of RAD-DINO (mean .5307, std .2583) belong to the DICOM files alone.
"""

from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import CHEXPERT_LABELS, NAN, Film, Manifest

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
OBTAIN = "https://physionet.org/content/mimic-cxr/ and mimic-cxr-jpg (credentialed access)"

SPLITS = {"train": "train", "validate": "val", "test": "test"}
EQUALISED = (
    "these JPEGs were equalised by histogram: set config.data.mean and std to those of summary.json, "
    "or prepare from the DICOM files"
)


def read(raw: Path, *, tables: str = "", views: str = "frontal", view_codes: str = "no") -> Manifest:
    """Every film; `pretrain` marks those of the official train split and of `views`.

    tables: folder of the MIMIC-CXR-JPG tables where `raw` has none. views: frontal (the paper) or all (the release).
    view_codes: yes takes the view from ViewCodeSequence_CodeMeaning where ViewPosition is blank.
    """
    manifest.choice("views", views, ("frontal", "all"))
    manifest.choice("view_codes", view_codes, ("no", "yes"))
    folder, found = Path(tables or raw), Manifest(labels=CHEXPERT_LABELS)
    labels = _chexpert(folder)
    blank = [NAN] * len(CHEXPERT_LABELS)
    suffix = ""
    splits = {row["dicom_id"]: SPLITS[row["split"]] for row in _table(folder, "split", ["dicom_id", "split"])}
    for row in _table(folder, "metadata", ["dicom_id", "subject_id", "study_id", "ViewPosition"]):
        suffix = suffix or _suffix(raw, row)
        projection = row["ViewPosition"]
        if not projection and view_codes == "yes":
            projection = row.get("ViewCodeSequence_CodeMeaning", "")
        view, split = manifest.view(projection), splits.get(row["dicom_id"], "")
        if not split:
            found.rejects.append((path(row) + suffix, "the table of splits does not name it"))
            continue
        found.films.append(Film(
            path(row) + suffix, row["dicom_id"], row["subject_id"], study=row["study_id"], split=split, view=view,
            projection=projection, pretrain=split == "train" and views in (view, "all"),
            labels=labels.get(row["study_id"], blank),
        ))  # fmt: skip
    if suffix == ".jpg":
        found.notes.append(EQUALISED)
    _compare(found, views)
    return found


def _compare(found: Manifest, views: str) -> None:
    ours = sum(film.pretrain for film in found.films)
    if views == "frontal":
        reason = "the paper's selection is unpublished; AP or PA of train are about 238,000 (--exclude=FILE)"
        found.compare("frontal films of train", 210_491, ours, reason)
    else:
        found.compare("films of train (the release)", 368_960, ours, "the release counts the official train split")


def path(row: dict) -> str:
    """Of a film below the raw folder, without suffix."""
    subject = f"p{row['subject_id'].removeprefix('p')}"
    return f"files/{subject[:3]}/{subject}/s{row['study_id'].removeprefix('s')}/{row['dicom_id']}"


def records(raw: Path) -> dict[str, Film]:
    """dicom_id -> film with path, patient, study: what other datasets that share these films need."""
    names = ("cxr-record-list.csv.gz", "cxr-record-list.csv", *_names("metadata"))
    found, suffix = {}, ""
    for row in manifest.rows(manifest.find(raw, *names), ["dicom_id", "subject_id", "study_id"]):
        suffix = suffix or _suffix(raw, row)
        found[row["dicom_id"]] = Film(
            str(raw / (path(row) + suffix)), row["dicom_id"], row["subject_id"], study=row["study_id"], view="frontal",
            pretrain=False,
        )  # fmt: skip
    return found


def _names(kind: str) -> tuple[str, ...]:
    return tuple(f"mimic-cxr-2.{minor}.0-{kind}.csv{gz}" for minor in (0, 1) for gz in (".gz", ""))


def _table(folder: Path, kind: str, needed: list[str]):
    return manifest.rows(manifest.find(folder, *_names(kind)), needed)


def _chexpert(folder: Path) -> dict[str, list[float]]:
    """study -> labels; studies whose report gave none are absent."""
    table = _table(folder, "chexpert", ["study_id", *CHEXPERT_LABELS])
    return {row["study_id"]: [manifest.label(row, name, "chexpert") for name in CHEXPERT_LABELS] for row in table}


def _suffix(raw: Path, row: dict) -> str:
    """.dcm or .jpg, whichever this film has; "" where neither is there, so that the next film is asked."""
    return next((suffix for suffix in (".dcm", ".jpg") if (raw / (path(row) + suffix)).exists()), "")
