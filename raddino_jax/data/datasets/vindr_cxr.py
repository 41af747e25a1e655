"""VinDr-CXR 1.0.0 (Nguyen et al. 2022): 18,000 frontal films, of which three radiologists read each of the 15,000 of
train, and five agreed on each of the 3,000 of test.

Layout: {train,test}/HASH.dicom, annotations/image_labels_{train,test}.csv. Patients are not named: each film counts as
one.
"""

from collections import defaultdict
from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import Film, Manifest

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
OBTAIN = "https://physionet.org/content/vindr-cxr/1.0.0/ (credentialed access)"

LABELS = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
    "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding",
)  # fmt: skip
# The columns of the paper's Table 1, where its text says six findings.
PAPER = (
    "Lung Opacity", "Cardiomegaly", "Pleural thickening", "Aortic enlargement", "Pulmonary fibrosis", "Tuberculosis",
    "Pleural effusion",
)  # fmt: skip


def read(raw: Path, *, vote: str = "majority") -> Manifest:
    """vote: how the readers of train decide, majority (more than half) or any. The paper does not say."""
    manifest.choice("vote", vote, ("majority", "any"))
    found = Manifest(labels=LABELS)
    for split, films in (("train", 15_000), ("test", 3_000)):
        table = manifest.find(raw, f"annotations/image_labels_{split}.csv")
        readings = defaultdict(list)
        for row in manifest.rows(table, ["image_id"]):
            row.setdefault("Other diseases", row.get("Other disease", ""))  # the spelling of the test table
            readings[row["image_id"]].append([manifest.label(row, name, table.name) for name in LABELS])
        for name, votes in readings.items():
            found.films.append(Film(
                f"{split}/{name}.dicom", name, name, split=split, view="frontal", projection="PA", pretrain=False,
                labels=[_decide(column, vote) for column in zip(*votes, strict=True)],
            ))  # fmt: skip
        found.compare(f"films of {split}", films, len(readings), "the table is not the whole one")
    return found


def _decide(votes: tuple[float, ...], vote: str) -> float:
    return float(any(votes) if vote == "any" else 2 * sum(votes) > len(votes))
