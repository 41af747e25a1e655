"""What arXiv 2401.10815 reports, as data: its tables cell by cell, and which rows of results.json stand beside them.

Means x 100; deviations, intervals and cells that are not known here are left out rather than guessed. The paper's text
numbers some tables only in passing: which rows stand under B.1, and that C.1 to C.4 are CANDID-PTX with RSNA, PadChest,
fairness and IU X-ray, is our reading. What the figures draw is known, not the numbers behind their curves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from raddino_jax.data.datasets import padchest, vindr_cxr


@dataclass(frozen=True)
class Table:
    """rows: the paper's row -> fields that a row of results.json has; columns: the same; numbers: row -> cells.

    common: fields that all cells share. needs: what has to be prepared first. more: what its commands (COMMANDS, by
    task) have besides. decimals: as printed.
    """

    title: str
    rows: Mapping[str, Mapping]
    columns: Mapping[str, Mapping]
    numbers: Mapping[str, tuple]
    common: Mapping
    needs: str
    more: str = ""
    decimals: int = 1


@dataclass(frozen=True)
class Figure:
    """Scores over what pre-training differed in. The paper draws these; the heights of its points are not known here.

    by: a field of the pre-training's config; places: name on the abscissa -> its value. command: of one point's
    pre-training, of which {value} or {preset} is the place. classes: of the rows, one line each; common: their fields.
    """

    title: str
    by: str
    places: Mapping[str, object]
    command: str
    classes: tuple[str, ...]
    common: Mapping
    needs: str
    presets: tuple[str, ...] = ()


PUBLIC = ("brax", "chexpert", "mimic_cxr", "chestx_ray14", "padchest")

# The paper's encoders, as it calls them, and as rows of results.json do.
ENCODERS = {
    "CLIP@224": "clip_vitl14_224", "CLIP@336": "clip_vitl14_336", "BioViL-T": "biovil_t", "BiomedCLIP": "biomedclip",
    "CheXzero": "chexzero", "MRM": "mrm", "RAD-DINO": "rad_dino", "DINOv2-B": "dinov2_vitb14",
    "DINOv2-G": "dinov2_vitg14", "DINOv2": "dinov2_vitb14",
}  # fmt: skip


def _encoders(*names: str) -> dict[str, dict]:
    """Rows that are known by their encoder; those without a name here are runs of one's own (`called`)."""
    return {name: {"encoder": ENCODERS.get(name, name)} for name in names}


_VINDR = {
    "CLIP@224": (9.7, 42.6, 18.8, 30.0, 24.1, 19.6, 21.8, 23.8),
    "CLIP@336": (9.1, 46.1, 18.5, 29.0, 22.8, 19.4, 18.6, 23.4),
    "BioViL-T": (12.7, 51.4, 24.6, 22.3, 30.5, 33.1, 52.2, 32.4),
    "BiomedCLIP": (10.0, 58.5, 24.4, 36.2, 32.0, 36.3, 54.1, 35.9),
    "CheXzero": (11.1, 74.4, 25.1, 42.9, 33.1, 33.5, 60.2, 40.0),
    "MRM": (12.2, 79.7, 35.8, 47.7, 47.1, 59.3, 77.2, 51.3),
    "RAD-DINO": (14.9, 69.9, 36.6, 44.6, 59.4, 66.3, 77.8, 52.8),
    "DINOv2-B": (11.6, 51.0, 27.5, 30.1, 28.4, 29.9, 42.5, 31.6),
    "DINOv2-G": (13.0, 54.4, 25.1, 29.3, 30.1, 32.3, 50.1, 33.5),
    "RAD-DINO random init": (11.7, 73.7, 31.7, 41.1, 39.7, 46.7, 76.7, 45.9),
}

def _command(task: str, arguments: str, name: str) -> str:
    return f"python -m raddino_jax.main --config=configs/{task}.py:{arguments} --config.data.data_dir=prepared " \
        f"--workdir=runs/{name}"


COMMANDS = {  # how a cell is made, by the task of its row, or by its dataset where that asks for another way
    "probe": _command("probe", "dataset={dataset},encoder={encoder}", "{dataset}_{encoder}"),
    "segment": _command("segment", "head={head},dataset={dataset},encoder={encoder}", "{dataset}_{head}_{encoder}"),
    "report": _command("report", "encoder={encoder},dataset={dataset}", "report_{encoder}")
    + " --config.data.reports=mimic-cxr-reports --config.llm=vicuna-7b-v1.5",
    "iu_xray": _command("report", "encoder={encoder},dataset={dataset}", "iu_xray_{encoder}")
    + " --config.llm=runs/report_{encoder}/writer",
    "demographics": _command("demographics", "encoder={encoder}", "demographics_{encoder}"),
}


def _vindr(title: str, *names: str) -> Table:
    columns = {name: {"class": name} for name in vindr_cxr.PAPER} | {"Agg.": {"class": "macro"}}
    return Table(
        title, _encoders(*names), columns, {name: _VINDR[name] for name in names},
        {"task": "probe", "dataset": "vindr_cxr", "metric": "auprc"}, "VinDr-CXR",
    )


_REPORT_METRICS = {name: {"metric": metric, "class": "macro"} for name, metric in (
    ("ROUGE-L", "rouge_l"), ("BLEU-4", "bleu_4"), ("RG_ER", "rg_er"), ("Macro-F1-14", "chexbert_f1"))}


def _reports(title: str, dataset: str, needs: str, numbers: dict) -> Table:
    common = {"task": "report", "dataset": dataset}
    return Table(title, _encoders(*numbers), _REPORT_METRICS, numbers, common, needs)


_MASKS = {"lungs": "lungs", "zones": "zones", "pneumothorax": "pneumothorax", "chest tubes": "tubes", "ribs": "ribs"}
_WORST = {"average": {"stratum": ""}, "worst group": {"stratum": "race: worst"}}

TABLES = {
    "1": _vindr("Table 1: findings of VinDr-CXR, linear probe, AUPRC",
                "CLIP@224", "CLIP@336", "BioViL-T", "BiomedCLIP", "CheXzero", "MRM", "RAD-DINO"),
    "B1": _vindr("Table B.1: initialisation, findings of VinDr-CXR, linear probe, AUPRC",
                 "DINOv2-B", "DINOv2-G", "RAD-DINO random init", "RAD-DINO"),
    "C1": Table(
        "Table C.1: CANDID-PTX (AUPRC) and RSNA Pneumonia (AUPRC, AUROC), linear probe",
        _encoders("CLIP@224", "CLIP@336", "BioViL-T", "CheXzero", "BiomedCLIP", "MRM", "RAD-DINO"),
        {
            "pneumothorax": {"dataset": "candid_ptx", "metric": "auprc", "class": "pneumothorax"},
            "chest tube": {"dataset": "candid_ptx", "metric": "auprc", "class": "chest tube"},
            "rib fracture": {"dataset": "candid_ptx", "metric": "auprc", "class": "rib fracture"},
            "RSNA AUPRC": {"dataset": "rsna_pneumonia", "metric": "auprc", "class": "Pneumonia"},
            "RSNA AUROC": {"dataset": "rsna_pneumonia", "metric": "auroc", "class": "Pneumonia"},
        },
        {
            "CLIP@224": (41.7, 25.2, 4.0, 60.1, 83.7), "CLIP@336": (43.6, 29.6, 5.2, 60.0, 84.2),
            "BioViL-T": (65.5, 31.1, 4.3, 66.8, 86.9), "CheXzero": (57.5, 42.9, 7.2, 68.9, 87.9),
            "BiomedCLIP": (60.4, 46.4, 8.1, 68.4, 87.5), "MRM": (74.9, 58.2, 12.2, 71.4, 89.0),
            "RAD-DINO": (80.1, 90.8, 13.4, 71.0, 88.4),
        },
        {"task": "probe"}, "CANDID-PTX and RSNA Pneumonia",
    ),
    "C2": Table(
        "Table C.2: lateral films of PadChest, linear probe, AUPRC",
        _encoders("BioViL-T", "BiomedCLIP", "MRM", "RAD-DINO"),
        {name: {"class": name} for name in padchest.LATERAL_PROBE} | {"Agg.": {"class": "macro"}},
        {
            "BioViL-T": (57.12, 82.10, 69.69, 69.64), "BiomedCLIP": (69.06, 90.60, 76.21, 78.62),
            "MRM": (76.97, 96.45, 83.09, 85.50), "RAD-DINO": (80.33, 94.53, 83.57, 86.14),
        },
        {"task": "probe", "dataset": "padchest", "metric": "auprc"}, "PadChest", decimals=2,
    ),
    "2": _reports("Table 2: reports of MIMIC-CXR", "mimic_cxr", "MIMIC-CXR with reports, and Vicuna-7B v1.5", {
        "CLIP@224": (23.0, 8.3, 20.3, 24.7), "CLIP@336": (23.3, 8.4, 20.4, 25.3), "DINOv2": (22.7, 7.6, 18.5, 18.6),
        "BiomedCLIP": (23.1, 7.9, 20.4, 24.9), "CheXzero": (23.2, 8.0, 20.6, 26.2),
        "BioViL-T": (23.5, 7.3, 22.4, 28.4), "RAD-DINO-Control": (24.2, 9.0, 22.4, 31.5),
        "RAD-DINO": (24.6, 9.3, 22.8, 31.9),
    }),
    "C4": _reports("Table C.4: reports of IU X-ray, as an external test", "iu_xray", "IU X-ray, and a run of Table 2", {
        "CLIP@224": (25.4, 9.2, 25.8, 18.1), "CLIP@336": (25.3, 8.0, 25.3, 18.5), "DINOv2": (25.4, 8.0, 23.6, 12.3),
        "BiomedCLIP": (20.2, 6.3, 20.0, 7.1), "CheXzero": (25.6, 8.5, 25.7, 18.1),
        "BioViL-T": (26.3, 8.2, 25.3, 20.2), "RAD-DINO-Control": (25.5, 9.2, 26.2, 23.8),
        "RAD-DINO": (25.8, 9.0, 26.2, 25.5),
    }),
    "3": Table(
        "Table 3: segmentation, Dice",
        {
            "nnU-Net": {"head": "unet", "encoder": "none"},
            "EfficientNet-B6 U-Net": {"head": "effunet", "encoder": "none"},
            "BioViL-T, linear": {"head": "linear", "encoder": "biovil_t"},
            "BiomedCLIP, linear": {"head": "linear", "encoder": "biomedclip"},
            "CheXzero, linear": {"head": "linear", "encoder": "chexzero"},
            "RAD-DINO without MIM, linear": {"head": "linear", "encoder": "RAD-DINO without MIM"},
            "RAD-DINO, linear": {"head": "linear", "encoder": "rad_dino"},
            "RAD-DINO, ViTDet": {"head": "vitdet", "encoder": "rad_dino"},
            "RAD-DINO, UPerNet": {"head": "upernet", "encoder": "rad_dino"},
        },
        {name: {"dataset": dataset} for name, dataset in _MASKS.items()},
        {
            "nnU-Net": (98.0, 92.6, 69.7, 78.1, 86.2), "EfficientNet-B6 U-Net": (98.3, 92.7, 73.5, 80.5, 88.9),
            "BioViL-T, linear": (83.2, 69.4, 30.2, 48.1, 59.1), "BiomedCLIP, linear": (90.4, 76.2, 29.3, 32.6, 67.4),
            "CheXzero, linear": (84.0, 68.3, 21.8, 47.7, 62.0),
            "RAD-DINO without MIM, linear": (91.3, 78.8, 35.8, 41.3, 67.3),
            "RAD-DINO, linear": (95.9, 85.7, 53.4, 63.0, 73.4), "RAD-DINO, ViTDet": (97.8, 90.7, 61.7, 54.4, 83.6),
            "RAD-DINO, UPerNet": (98.0, 91.2, 65.8, 71.9, 85.3),
        },
        {"task": "segment", "metric": "dice", "class": "macro", "stratum": ""}, "the datasets of masks",
    ),
    "5": Table(
        "Table 5: demographics of MIMIC-CXR patients without finding, logistic regression, accuracy",
        _encoders("BioViL-T", "BiomedCLIP", "RAD-DINO"),
        {name: {"class": name} for name in ("sex", "age", "weight", "bmi", "ethnicity")},
        {
            "BioViL-T": (75.1, 60.8, 43.8, 47.6, 64.8), "BiomedCLIP": (86.0, 56.5, 52.8, 54.2, 64.6),
            "RAD-DINO": (99.6, 72.3, 62.4, 71.3, 76.9),
        },
        {"task": "demographics", "dataset": "mimic_iv", "metric": "accuracy", "stratum": ""},
        "MIMIC-CXR joined with MIMIC-IV",
    ),
    "C3": Table(
        "Table C.3: fairness, average and worst ethnic group of Dice (linear heads) and ROUGE-L",
        _encoders("BioViL-T", "BiomedCLIP", "RAD-DINO"),
        {
            f"{what}, {which}": {**where, "class": "macro", **stratum}
            for what, where in (
                ("lungs", {"task": "segment", "head": "linear", "dataset": "lungs", "metric": "dice"}),
                ("zones", {"task": "segment", "head": "linear", "dataset": "zones", "metric": "dice"}),
                ("ROUGE-L", {"task": "report", "dataset": "mimic_cxr", "metric": "rouge_l"}),
            )
            for which, stratum in _WORST.items()
        },
        {
            "BioViL-T": (83.2, 81.4, 69.4, 66.2, 23.5, 16.3), "BiomedCLIP": (90.4, 89.9, 76.0, 73.1, 23.1, 16.6),
            "RAD-DINO": (95.9, 95.6, 85.7, 82.1, 24.6, 16.6),
        },
        {}, "the datasets with the race of MIMIC-IV", " --config.strata=\"('race',)\"",
    ),
}

_PRETRAIN = _command("multicxr", "{preset},init=dinov2_vitb14", "{name}")
_SIZES = {f"{size} px": size for size in (224, 322, 420, 518)}  # its ends are the paper's
_RESOLUTION = _PRETRAIN.format(preset="resolution={value}", name="resolution_{value}")

FIGURES = {
    "figB1": Figure(
        "Figure B.1: resolution of pre-training and use, findings of VinDr-CXR", "views.global_size", _SIZES,
        _RESOLUTION, ("macro",), {"task": "probe", "dataset": "vindr_cxr", "metric": "auprc"},
        "the Multi-CXR sets and VinDr-CXR",
    ),
    "figB2": Figure(
        "Figure B.2: number and diversity of the films of pre-training", "data.sources",
        {
            "MIMIC-CXR, 197k": ["mimic_cxr"],
            "frontal, 546k": [f"{name}:frontal" for name in PUBLIC],
            "and lateral": list(PUBLIC),
            "and private, 838k": ["multicxr"],
        },
        _PRETRAIN.format(preset="data={preset}", name="data_{preset}"), ("macro",),
        {"task": "probe", "dataset": "vindr_cxr", "metric": "auprc"}, "the Multi-CXR sets and VinDr-CXR",
        presets=("mimic", "frontal", "public", "all"),
    ),
    "figC1": Figure(
        "Figure C.1: resolution of pre-training and use, CANDID-PTX", "views.global_size", _SIZES, _RESOLUTION,
        ("pneumothorax", "chest tube"), {"task": "probe", "dataset": "candid_ptx", "metric": "auprc"},
        "the Multi-CXR sets and CANDID-PTX",
    ),
}
