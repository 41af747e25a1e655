"""CheXpert (Irvin et al. 2019): 224,316 films of 65,240 patients of Stanford, 14 labels read from the reports.

Layout, original or "-small": CheXpert-v1.0[-small]/{train,valid}/patientNNNNN/studyN/viewN_{frontal,lateral}.jpg with
train.csv and valid.csv, whose Path begins with the name of the folder. Labels: 1, 0, -1 (uncertain), blank (not
mentioned); those of valid were set by radiologists. The paper trains on train and valid.
"""

from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import CHEXPERT_LABELS, Film, Manifest, ManifestError

LICENCE = "Stanford University Dataset Research Use Agreement"
OBTAIN = "https://aimi.stanford.edu/datasets/chexpert-chest-x-rays (registration)"

SPLITS = {"train": "train", "valid": "val"}
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_LABELS)


def read(raw: Path, *, pretrain_on: str = "train+valid") -> Manifest:
    """pretrain_on: train+valid (the paper's count) or train."""
    used = manifest.choice("pretrain_on", pretrain_on, ("train+valid", "train")).split("+")
    root = manifest.find(raw, "train.csv", "CheXpert-v1.0/train.csv", "CheXpert-v1.0-small/train.csv").parent
    found = Manifest(labels=CHEXPERT_LABELS)
    for split in SPLITS:
        table = manifest.find(root, f"{split}.csv")
        found.films += [_film(raw, root, row, split, used, table.name) for row in manifest.rows(table, COLUMNS)]
    found.compare("films", 223_648, sum(film.pretrain for film in found.films), "the paper counts train and valid")
    return found


def _film(raw: Path, root: Path, row: dict, split: str, used: list[str], table: str) -> Film:
    parts = Path(row["Path"]).parts
    if split not in parts or len(parts) - parts.index(split) != 4:
        raise ManifestError(f"{table}: expected a Path .../{split}/patient/study/view.jpg, found {row['Path']}")
    patient, study, name = parts[parts.index(split) + 1 :]
    return Film(
        (root.relative_to(raw) / split / patient / study / name).as_posix(), f"{patient}_{study}_{Path(name).stem}",
        patient, study=f"{patient}_{study}", split=SPLITS[split], view=manifest.view(row["Frontal/Lateral"]),
        projection=row["AP/PA"], sex=manifest.sex(row["Sex"]), age=manifest.age(row["Age"]), pretrain=split in used,
        labels=[manifest.label(row, name, table) for name in CHEXPERT_LABELS],
    )  # fmt: skip
