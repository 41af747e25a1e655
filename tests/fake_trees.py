"""Small raw trees in the exact layout of each dataset, with the defects that the real ones are known for.

A generator draws every film itself and says in `Film` what a faithful preparation must give: pixels, labels, split,
view, masks. Films are drawn with the short side that they are prepared with, so that no resizing blurs the comparison.
"""

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit

SIZE = 32
SECRET = "Doe^Jane"
CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
NAN = float("nan")


@dataclass
class Film:
    """What must come out of a film. lossy: mean absolute difference allowed to its pixels."""

    pixels: np.ndarray
    patient: str
    split: str
    view: str
    pretrain: bool
    labels: dict[str, float] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    more: dict[str, object] = field(default_factory=dict)
    lossy: float = 0


@dataclass
class Tree:
    """A raw folder, the options to read it with, and what must come of it: films by id, rejected names, counts."""

    raw: Path
    films: dict[str, Film]
    options: dict = field(default_factory=dict)
    rejects: Sequence[str] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    size: int = SIZE


def drawn(index: int, height: int = SIZE, width: int = 40) -> np.ndarray:
    """A film of its own for each index; black and white occur, so that minimum and maximum are 0 and 255."""
    grey = np.random.default_rng(index).integers(0, 256, (height, width), np.uint8)
    grey[0, :2] = 0, 255
    return grey


def smooth(index: int, height: int = 64, width: int = 64) -> np.ndarray:
    """A film that JPEG keeps nearly as it is."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    grey = 0.5 + 0.5 * np.sin(2 * x + 3 * y + index)
    return np.rint(255 * (grey - grey.min()) / (grey.max() - grey.min())).astype(np.uint8)


def png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def dicom(path: Path, stored: np.ndarray, photometric: str = "MONOCHROME2", bits: int = 0, packed: str = "") -> None:
    """stored: what the file holds. packed: "", "jpeg" or "jpeg2000"."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    syntax = {"": ExplicitVRLittleEndian, "jpeg": JPEGBaseline8Bit, "jpeg2000": JPEG2000Lossless}[packed]
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.PatientName, data.PatientID, data.StudyDate = SECRET, "Doe-4711", "20200102"
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, photometric
    data.BitsAllocated = 8 * stored.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    if packed == "jpeg":
        data.PixelData = encapsulate([jpeg(stored)])
    elif packed == "jpeg2000":
        file = io.BytesIO()
        Image.fromarray(stored).save(file, "JPEG2000", irreversible=False, no_jp2=True)
        data.PixelData = encapsulate([file.getvalue()])
    else:
        data.PixelData = stored.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def twelve_bits(grey: np.ndarray) -> np.ndarray:
    """The same film with 12 bits: minimum to maximum gives it back exactly."""
    return np.rint(grey.astype(np.float64) * 4095 / 255).astype(np.uint16)


def table(path: Path, columns: Sequence[str], rows: Sequence[Sequence], end: str = "") -> None:
    """A CSV, gzipped by its suffix. end: what every line ends with."""
    text = io.StringIO()
    csv.writer(text, lineterminator=f"{end}\n").writerows([columns, *rows])
    data = text.getvalue().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def words(values: Sequence[float]) -> list[str]:
    """Labels as CheXpert's tables write them."""
    return ["" if value != value else f"{value:.1f}" for value in values]


def chexpert_labels(index: int) -> list[float]:
    """1, 0, -1 and blank, at other places for each film."""
    return [(1.0, 0.0, -1.0, NAN)[(index + place) % 4] for place in range(14)]


def brax(folder: Path) -> Tree:
    """DICOM of 12 bits, MONOCHROME1 among them; one without suffix, one without view, one missing."""
    raw, films, rows = folder / "brax", {}, []
    for index, view in enumerate(["AP", "PA", "L", "", "RL", "PA"]):
        patient, grey = f"id_{index // 2}", drawn(index)
        name = f"{patient}/Study_1.{index}/Series_2.{index}/image-3.{index}"
        stored = twelve_bits(grey)
        if index % 2:
            stored, photometric = 4095 - stored, "MONOCHROME1"
        else:
            photometric = "MONOCHROME2"
        path = raw / "Anonymized_DICOMs" / f"{name}.dcm"
        if index < 5:
            dicom(path, stored, photometric, bits=12)
            view_kind = ["frontal", "frontal", "lateral", "unknown", "lateral"][index]
            films[f"image-3.{index}"] = Film(
                grey, f"pat{index // 2}", "train", view_kind, True,
                dict(zip(CHEXPERT, chexpert_labels(index), strict=True)),
            )  # fmt: skip
        if index == 2:
            path.rename(path.with_suffix(""))
        rows.append([f"Anonymized_DICOMs/{name}.dcm", f"images/{name}.png", f"pat{index // 2}", "F", "45",
                     f"acc{index}", "20150101", *words(chexpert_labels(index)), view, 32, 40, "maker"])  # fmt: skip
    columns = ["DicomPath", "PngPath", "PatientID", "PatientSex", "PatientAge", "AccessionNumber", "StudyDate",
               *CHEXPERT, "ViewPosition", "Rows", "Columns", "Manufacturer"]  # fmt: skip
    table(raw / "master_spreadsheet_update.csv", columns, rows)
    return Tree(raw, films, rejects=["image-3.5.dcm"])


def chexpert(folder: Path) -> Tree:
    """The small variant, whose name stands in every path; a lateral film, age 0, an unknown sex."""
    raw, films = folder / "chexpert", {}
    for split, count in (("train", 4), ("valid", 2)):
        rows = []
        for index in range(count):
            grey = smooth(index + 10 * (split == "valid"), SIZE, 40)
            view = ["frontal", "lateral"][index % 2]
            place = f"{split}/patient0000{index // 2}/study{index % 2 + 1}/view1_{view}.jpg"
            path = raw / "CheXpert-v1.0-small" / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(grey))
            patient = f"patient{split == 'valid':d}000{index // 2}"
            place = place.replace(f"patient0000{index // 2}", patient)
            (raw / "CheXpert-v1.0-small" / place).parent.mkdir(parents=True, exist_ok=True)
            path.rename(raw / "CheXpert-v1.0-small" / place)
            rows.append([f"CheXpert-v1.0-small/{place}", ["Female", "Male", "Unknown"][index % 3], [0, 68][index % 2],
                         view.capitalize(), ["AP", ""][index % 2], *words(chexpert_labels(index))])  # fmt: skip
            films[f"{patient}_study{index % 2 + 1}_view1_{view}"] = Film(
                grey, patient, {"train": "train", "valid": "val"}[split], view, True,
                dict(zip(CHEXPERT, chexpert_labels(index), strict=True)),
                more=dict(sex=["F", "M", ""][index % 3], age=[NAN, 68.0][index % 2]), lossy=2,
            )  # fmt: skip
        columns = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT]
        table(raw / "CheXpert-v1.0-small" / f"{split}.csv", columns, rows)
    return Tree(raw, films)


MIMIC_ID = "0a1b2c3{0}-11111111-22222222-33333333-4444444{0}"


def mimic_cxr(folder: Path, films: int = 8) -> Tree:
    """DICOM tree with the tables of MIMIC-CXR-JPG, gzipped: blank and odd views, a study without labels."""
    raw, expected, metadata, splits, labels, records = folder / "mimic_cxr", {}, [], [], [], []
    views = ["AP", "PA", "LATERAL", "LL", "LPO", "", "PA", "AP"]
    official = ["train", "train", "train", "train", "train", "train", "validate", "test"]
    for index in range(films):
        name, subject, study = MIMIC_ID.format(index), f"1000{index // 2}000", f"5000000{index}"
        grey = drawn(index)
        path = f"files/p{subject[:2]}/p{subject}/s{study}/{name}.dcm"
        dicom(raw / path, twelve_bits(grey), bits=12)
        codes = "postero-anterior" if index == 5 else ""
        metadata.append([name, subject, study, "CHEST (PA AND LAT)", views[index], 32, 40, "21800506", "213014.531", "",
                         codes, "Erect"])  # fmt: skip
        splits.append([name, study, subject, official[index]])
        records.append([subject, study, name, path])
        values = [NAN] * 14
        if index != 3:
            values = chexpert_labels(index)
            labels.append([subject, study, *words(values)])
        view = ["frontal", "frontal", "lateral", "lateral", "other", "unknown", "frontal", "frontal"][index]
        expected[name] = Film(
            grey, subject, {"validate": "val"}.get(official[index], official[index]), view, index < 2,
            dict(zip(CHEXPERT, values, strict=True)),
        )  # fmt: skip
    columns = ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows",
               "Columns", "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
               "PatientOrientationCodeSequence_CodeMeaning"]  # fmt: skip
    table(raw / "mimic-cxr-2.0.0-metadata.csv.gz", columns, metadata)
    table(raw / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id", "study_id", "subject_id", "split"], splits)
    table(raw / "mimic-cxr-2.0.0-chexpert.csv.gz", ["subject_id", "study_id", *CHEXPERT], labels)
    table(raw / "cxr-record-list.csv.gz", ["subject_id", "study_id", "dicom_id", "path"], records)
    return Tree(raw, expected)


NIH = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax", "No Finding",
)  # fmt: skip


def chestx_ray14(folder: Path) -> Tree:
    """The broken header, films over two folders, an RGBA file, a patient of 412 years, a file that is not there."""
    raw, films, rows = folder / "nih", {}, []
    findings = ["Effusion|Mass", "No Finding", "Pleural_Thickening", "Hernia", "No Finding"]
    for index, found in enumerate(findings):
        name, grey = f"{index // 2 + 1:08d}_{index % 2:03d}", drawn(index)
        if index < 4:
            pixels = np.dstack([grey] * 3 + [np.full_like(grey, 255)]) if index == 2 else grey
            png(raw / f"images_00{index % 2 + 1}" / "images" / f"{name}.png", pixels)
            films[name] = Film(
                grey, name[:8], ["train", "train", "test", "test"][index], "frontal", index != 3,
                {label: float(label in found.split("|")) for label in NIH},
                more=dict(age=[58.0, NAN, 3.0, 0.25][index], projection=["PA", "AP"][index % 2]),
            )  # fmt: skip
        rows.append([f"{name}.png", found, index % 2, int(name[:8]), ["058Y", "412Y", "3", "003M", "40"][index], "M",
                     ["PA", "AP"][index % 2], 2682, 2749, 0.143, 0.143])  # fmt: skip
    header = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
              "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n")  # fmt: skip
    body = "".join(",".join(map(str, row)) + ",\n" for row in rows)
    (raw / "Data_Entry_2017.csv").write_text(header + body)
    names = list(films)
    (raw / "train_val_list.txt").write_text("".join(f"{name}.png\n" for name in names[:2]))
    (raw / "test_list.txt").write_text("".join(f"{name}.png\n" for name in names[2:]))
    mapping = folder / "pneumonia-challenge-dataset-mappings_2018.json"
    mapping.write_text(json.dumps([{"img_id": f"{names[3]}.png", "subset_img_id": "uuid-0", "orig_labels": []}]))
    return Tree(raw, films, dict(without_rsna=str(mapping)), rejects=["00000003_000.png"], notes=["1 films that RSNA"])


def padchest(folder: Path) -> Tree:
    """16-bit PNG of 12 bits, blanks before labels, no labels, excluded films, MONOCHROME1, a cut and a missing file."""
    raw, films, rows = folder / "padchest", {}, []
    cases = [  # projection, labels, photometric, what becomes of it
        ("PA", "['normal']", "MONOCHROME2", "kept"),
        ("L", "[' pleural effusion', 'cardiomegaly']", "MONOCHROME2", "kept"),
        ("L", "['normal']", "MONOCHROME2", "kept"),
        ("AP_horizontal", "['cardiomegaly', ' cardiomegaly']", "MONOCHROME1", "kept"),
        ("COSTAL", "['normal']", "MONOCHROME2", "kept"),
        ("EXCLUDE", "['normal']", "MONOCHROME2", "dropped"),
        ("PA", "['exclude']", "MONOCHROME2", "dropped"),
        ("AP", "", "MONOCHROME2", "kept"),
        ("PA", "['normal']", "MONOCHROME2", "cut off"),
        ("PA", "['normal']", "MONOCHROME2", "missing"),
        ("PA", "['pleural effusion']", "MONOCHROME2", "kept"),
    ]
    probe = ("costophrenic angle blunting", "pleural effusion", "vertebral degenerative changes")
    names = ("cardiomegaly", "normal", *probe)
    views = {"PA": "frontal", "L": "lateral", "AP_horizontal": "frontal", "AP": "frontal", "COSTAL": "other"}
    for index, (projection, labels, photometric, fate) in enumerate(cases):
        name, grey = f"21684011136696401{index:02d}_00-1", drawn(index)
        stored = twelve_bits(grey)
        path = raw / str(index % 3) / f"{name}.png"
        if fate != "missing":
            png(path, 4095 - stored if photometric == "MONOCHROME1" else stored)
        if fate == "cut off":
            path.write_bytes(path.read_bytes()[:-500])
        # Film 10 is the frontal view of film 1's study, which the lateral probe holds out.
        study = f"study{1 if index == 10 else index}"
        rows.append([f"{name}.png", index % 3, "20140915", study, f"patient{index // 2}", "1950.0", "F",
                     "POSTEROANTERIOR", projection, "Physician", photometric, 12, labels])  # fmt: skip
        if fate == "kept":
            listed = labels.replace("'", "").strip("[]").split(",")
            listed = [label.strip() for label in listed]
            values = {label: float(label in listed) if labels else NAN for label in names}
            films[name] = Film(
                grey, f"patient{index // 2}", "train", views[projection], index not in (1, 2, 10), values,
                more=dict(lateral_probe=float(index in (1, 2)), age=64.0),
            )  # fmt: skip
    columns = ["ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM",
               "ViewPosition_DICOM", "Projection", "MethodLabel", "PhotometricInterpretation_DICOM", "BitsStored_DICOM",
               "Labels"]  # fmt: skip
    table(raw / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", columns, rows)
    return Tree(
        raw, films, dict(min_films=2), rejects=["08_00-1.png", "09_00-1.png"], notes=["1 films said MONOCHROME1"],
        left_out={"marked to exclude by the dataset": 2},
    )  # fmt: skip


VINDR = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
    "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding",
)  # fmt: skip


def vindr_cxr(folder: Path) -> Tree:
    """Three readers who disagree; MONOCHROME1, JPEG 2000; the other spelling in the table of test."""
    raw, films, votes, consensus = folder / "vindr", {}, [], []
    for index in range(5):
        name, grey = f"{index:032x}", drawn(index)
        split = "train" if index < 3 else "test"
        path = raw / split / f"{name}.dicom"
        if index % 2:
            dicom(path, 4095 - twelve_bits(grey), "MONOCHROME1", bits=12)
        else:
            dicom(path, grey, packed="jpeg2000")
        if split == "train":  # label p is seen by (p + index) % 4 of the three readers
            seen = [(place + index) % 4 for place in range(28)]
            votes += [[name, f"R{reader}", *(int(reader < count) for count in seen)] for reader in range(3)]
            values = [float(count >= 2) for count in seen]
        else:
            values = [float((place + index) % 3 == 0) for place in range(28)]
            consensus.append([name, *(int(value) for value in values)])
        films[name] = Film(grey, name, split, "frontal", False, dict(zip(VINDR, values, strict=True)))
    table(raw / "annotations/image_labels_train.csv", ["image_id", "rad_ID", *VINDR], votes)
    test = [{"Other diseases": "Other disease"}.get(name, name) for name in VINDR]
    table(raw / "annotations/image_labels_test.csv", ["image_id", *test], consensus)
    return Tree(raw, films)


def runs_of(mask: np.ndarray) -> str:
    """SIIM's runs, found pixel by pixel: gap since the last run's end and length, down the columns."""
    runs, gap, length = [], 0, 0
    for column in range(mask.shape[1]):
        for row in range(mask.shape[0]):
            if mask[row, column]:
                length += 1
            elif length:
                runs += [gap, length]
                gap, length = 1, 0
            else:
                gap += 1
    return " ".join(map(str, [*runs, gap, length] if length else runs))


def candid_ptx(folder: Path) -> Tree:
    """No suffixes; "-1", an empty cell, two outlines of one film, a film of two patients."""
    raw, films, reports, tubes = folder / "candid", {}, [], []
    empty = np.zeros((1024, 1024), np.uint8)
    shapes = []
    for index in range(3):
        mask = empty.copy()
        mask[100 * index + 3 : 100 * index + 40, 700 : 730 + index] = 1  # taller than wide: transposed it would differ
        shapes.append(mask)
    cells = {"1.2.0": [runs_of(shapes[0]), runs_of(shapes[1])], "1.2.1": ["-1"], "1.2.2": [""], "1.2.3": ["-1"]}
    for index, (name, outlines) in enumerate(cells.items()):
        grey = np.kron(drawn(index, 32, 32), np.ones((32, 32), np.uint8))
        dicom(raw / "dataset" / name, grey)
        for cell in outlines:
            patients = ["P1", "P2"] if name == "1.2.3" else [f"P{index}"]
            reports += [[name, f"9.{index}", cell, "report text", f"{patient}_{index}.dcm"] for patient in patients]
        if name != "1.2.3":
            pneumothorax = shapes[0] | shapes[1] if index == 0 else empty
            tube = shapes[2] if index == 1 else empty
            films[name] = Film(
                grey, f"P{index}", "", "frontal", False,
                {"pneumothorax": [1.0, 0.0, NAN][index], "chest tube": float(index == 1), "rib fracture": 0.0},
                {"pneumothorax": np.full_like(empty, 255) if index == 2 else pneumothorax, "chest tube": tube,
                 "rib fracture": empty},
            )  # fmt: skip
    tubes = [["1.2.1", "a1", runs_of(shapes[2])], ["1.2.0", "a2", "-1"]]
    columns = ["SOPInstanceUID", "StudyInstanceUID", "EncodedPixels", "Report", "filename"]
    table(raw / "Pneumothorax_reports.csv", columns, reports)
    table(raw / "chest_tube.csv", ["anon_SOPUID", "annotation", "mask_rle"], tubes)
    table(raw / "Rib_fracture_mask_rle.csv", ["anon_SOPUID", "annotation", "mask_rle"], [])
    return Tree(raw, films, size=1024, left_out={"given to several patients": 1})


def rsna_pneumonia(folder: Path) -> Tree:
    """JPEG inside DICOM; several boxes on a film; two films of one patient by the mapping."""
    raw, films, rows, classes, mapping = folder / "rsna", {}, [], [], []
    boxes = [[(4, 8, 20, 10), (30, 30, 12, 25)], [], [], [(0, 0, 64, 5)]]
    for index, found in enumerate(boxes):
        name, grey = f"uuid-{index}", smooth(index)
        dicom(raw / "stage_2_train_images" / f"{name}.dcm", grey, packed="jpeg")
        mask = np.zeros((64, 64), np.uint8)
        for x, y, width, height in found:
            mask[y : y + height, x : x + width] = 1
            rows.append([name, float(x), float(y), float(width), float(height), 1])
        if not found:
            rows.append([name, "", "", "", "", 0])
        kind = "Lung Opacity" if found else ["Normal", "No Lung Opacity / Not Normal"][index - 1]
        classes += [[name, kind]] * max(len(found), 1)
        mapping.append({"subset_img_id": name, "img_id": f"{index // 2:08d}_{index:03d}.png"})
        films[name] = Film(
            grey, f"{index // 2:08d}", "", "frontal", False,
            {"Pneumonia": float(bool(found)), "Normal": float(kind == "Normal")}, {"opacity": mask}, lossy=2,
        )  # fmt: skip
    table(raw / "stage_2_train_labels.csv", ["patientId", "x", "y", "width", "height", "Target"], rows)
    table(raw / "stage_2_detailed_class_info.csv", ["patientId", "class"], classes)
    path = folder / "mapping.json"
    path.write_text(json.dumps(mapping))
    return Tree(raw, films, dict(mapping=str(path)), size=64)


def lungs(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and left lung [32, 40] of a film; the patient's right is on the left."""
    right, left = np.zeros((2, SIZE, 40), np.uint8)
    right[4 : 26 + index % 3, 4:14] = 1
    left[6:24, 24 : 33 + index % 3] = 1
    return right, left


def lung_pictures(folder: Path, indices: Sequence[int]) -> Path:
    """Pairs of pictures: the film within the lungs, and the rest; a speck and a hole in the lungs."""
    raw = folder / "lung-segment-mimic-cxr"
    for index in indices:
        right, left = lungs(index)
        film = 60 + drawn(index) // 2
        shown = np.where(right | left, film, 0).astype(np.uint8)
        shown[10:13, 8:10] = 0  # dark vessels inside the lung
        rest = np.where(right | left, 0, film).astype(np.uint8)
        png(raw / "images" / f"{MIMIC_ID.format(index)}_lung.png", shown)
        png(raw / "images" / f"{MIMIC_ID.format(index)}_rest.png", rest)
    return raw


def mimic_lungs(folder: Path) -> Tree:
    """Two pictures per film, one of a film that MIMIC-CXR does not have."""
    mimic = mimic_cxr(folder)
    raw = lung_pictures(folder, range(3))
    png(raw / "images" / f"{MIMIC_ID.format(9)}_lung.png", drawn(9))
    films = {}
    for index in range(3):
        name = MIMIC_ID.format(index)
        right, left = lungs(index)
        films[name] = Film(mimic.films[name].pixels, mimic.films[name].patient, "", "frontal", False,
                           masks={"right lung": right, "left lung": left})  # fmt: skip
    return Tree(raw, films, dict(mimic_cxr_dir=str(mimic.raw)), rejects=[MIMIC_ID.format(9)])


def chest_imagenome(folder: Path) -> Tree:
    """Scene graphs in their zip; a zone without box, a film to avoid, one without graph."""
    mimic = mimic_cxr(folder)
    pictures = lung_pictures(folder, range(4))
    raw, films = folder / "imagenome", {}
    boxes = {"upper": (0, 12), "mid": (11, 20), "lower": (19, 32)}
    (raw / "silver_dataset/splits").mkdir(parents=True)
    with zipfile.ZipFile(raw / "silver_dataset/scene_graph.zip", "w") as archive:
        for index in range(3):
            name, objects, masks = MIMIC_ID.format(index), [], {}
            sides = dict(zip(("right", "left"), lungs(index), strict=True))
            for side, columns in (("right", (0, 18)), ("left", (20, 40))):
                for height, (top, bottom) in boxes.items():
                    zone = f"{side} {height} lung zone"
                    box = np.zeros((SIZE, 40), np.uint8)
                    box[top:bottom, columns[0] : columns[1]] = 1
                    masks[zone] = box & sides[side]
                    if (index, zone) == (1, "left mid lung zone"):
                        masks[zone] = np.full_like(box, 255)
                        continue
                    objects.append({"bbox_name": zone, "x1": 1, "y1": 2, "x2": 3, "y2": 4, "original_x1": columns[0],
                                    "original_y1": top, "original_x2": columns[1], "original_y2": bottom})  # fmt: skip
            archive.writestr(f"scene_graph/{name}_SceneGraph.json", json.dumps({"image_id": name, "objects": objects}))
            if index < 2:
                film = mimic.films[name]
                films[name] = Film(film.pixels, film.patient, "", "frontal", False, masks=masks)
    table(raw / "silver_dataset/splits/images_to_avoid.csv", ["subject_id", "study_id", "dicom_id"],
          [[1, 2, MIMIC_ID.format(2)]])  # fmt: skip
    options = dict(mimic_cxr_dir=str(mimic.raw), lungs_dir=str(pictures))
    left_out = {"listed in images_to_avoid.csv": 1, "lungs without film or scene graph": 1}
    return Tree(raw, films, options, left_out=left_out)


def vindr_ribcxr(folder: Path) -> Tree:
    """Polygons of twenty ribs; a rib that says "None"."""
    raw, films = folder / "ribs", {}
    ribs = [f"{side}{number}" for side in "RL" for number in range(1, 11)]
    for split, count in (("train", 4), ("val", 2)):
        masks = {"img": {}} | {rib: {} for rib in ribs}
        for index in range(count):
            name, grey = f"VinDr_RibCXR_{split}_{index:03d}", drawn(index + 50 * (split == "val"))
            png(raw / "data" / split / "img" / f"{name}.png", grey)
            masks["img"][str(index)] = f"data/{split}/img/{name}.png"
            expected = {}
            for place, rib in enumerate(ribs):
                top, left = place % 10 * 3, 2 if rib[0] == "R" else 22
                corners = [(left, top), (left + 14, top), (left + 14, top + 1), (left, top + 1)]
                drawn_rib = np.zeros((SIZE, 40), np.uint8)
                drawn_rib[top : top + 2, left : left + 15] = 1  # an outline belongs to its rib
                masks[rib][str(index)] = [{"x": x, "y": y} for x, y in corners]
                if (index, rib) == (1, "L10"):
                    masks[rib][str(index)], drawn_rib = "None", np.full_like(drawn_rib, 255)
                expected[rib] = drawn_rib
            films[name] = Film(grey, name, "test" if split == "val" else "", "frontal", False, masks=expected)
        (raw / "data" / f"Vindr_RibCXR_{split}_mask.json").write_text(json.dumps(masks))
    return Tree(raw, films)


IU_TEXTS = {"indication": "Cough.", "comparison": "", "findings": "Heart normal. XXXX lungs.", "impression": "None."}


def iu_xray(folder: Path, layout: str = "kaggle") -> Tree:
    """RGB files; a report without findings, one without films, two films of one report."""
    raw, films, reports, projections = folder / f"iu_{layout}", {}, [], []
    for index in range(4):
        uid, texts = str(index + 1), dict(IU_TEXTS, findings="" if index == 2 else f"{IU_TEXTS['findings']} {index}")
        names = [] if index == 3 else [f"CXR{uid}_IM-0001-{number}001" for number in (3, 4)]
        for place, stem in enumerate(names):
            grey, name = drawn(10 * index + place), f"{stem}.dcm" if layout == "kaggle" else stem
            folder_name = "images/images_normalized" if layout == "kaggle" else "NLMCXR_png"
            png(raw / folder_name / f"{name}.png", np.dstack([grey] * 3))
            view = ["Lateral", "Frontal"][place]
            if layout == "kaggle":
                projections.append([uid, f"{name}.png", view])
            films[name] = Film(
                grey, uid, "test", view.lower() if layout == "kaggle" else "unknown", False,
                more=texts | dict(first_frontal=float(layout == "kaggle" and place == 1)),
            )  # fmt: skip
        reports.append([uid, "normal", "normal", "Xray Chest PA and Lateral", *texts.values()])
        if layout != "kaggle":
            sections = "".join(f'<AbstractText Label="{k.upper()}">{v}</AbstractText>' for k, v in texts.items())
            images = "".join(f'<parentImage id="{name}"><figureId>F1</figureId></parentImage>' for name in names)
            path = raw / "ecgen-radiology" / f"{uid}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'<eCitation><uId id="CXR{uid}"/><MedlineCitation><Article><Abstract>{sections}</Abstract>'
                            f"</Article></MedlineCitation>{images}</eCitation>")  # fmt: skip
    if layout == "kaggle":
        columns = ["uid", "MeSH", "Problems", "image", *IU_TEXTS]
        table(raw / "indiana_reports.csv", columns, reports)
        table(raw / "indiana_projections.csv", ["uid", "filename", "projection"], projections)
    return Tree(raw, films, left_out={"reports without a film": 1})


def mimic_iv(folder: Path) -> Tree:
    """Weights in pounds, an impossible one, a tie between races, a patient that MIMIC-IV lacks."""
    mimic = mimic_cxr(folder)
    raw, films = folder / "mimic_iv", {}
    people = [["10000000", "F", 50, 2178, "2014 - 2016", ""], ["10002000", "M", 71, 2181, "2011 - 2013", ""]]
    columns = ["subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group", "dod"]
    table(raw / "hosp/patients.csv.gz", columns, people)
    admissions = [
        ["10000000", "1", "2179-01-01 10:00:00", "WHITE - RUSSIAN"], ["10000000", "2", "2180-01-01 10:00:00", "ASIAN"],
        ["10000000", "3", "2181-01-01 10:00:00", "UNKNOWN"], ["10002000", "4", "2180-01-01 10:00:00", "PORTUGUESE"],
    ]  # fmt: skip
    table(raw / "hosp/admissions.csv.gz", ["subject_id", "hadm_id", "admittime", "race"], admissions)
    omr = [
        ["10000000", "2180-05-10", 1, "Weight (Lbs)", "150"], ["10000000", "2180-04-01", 1, "Weight (Lbs)", "160"],
        ["10000000", "2180-05-06", 1, "Weight (Lbs)", "1500"], ["10000000", "2180-06-06", 1, "BMI (kg/m2)", "24.5"],
        ["10000000", "2180-05-07", 1, "BMI (kg/m2)", "245"], ["10000000", "2180-05-06", 1, "Blood Pressure", "110/70"],
    ]  # fmt: skip
    table(raw / "hosp/omr.csv.gz", ["subject_id", "chartdate", "seq_num", "result_name", "result_value"], omr)
    # Films 0, 4, 8 ... have No Finding = 1, which is index % 4 == 0; of those only film 0 is frontal.
    film = mimic.films[MIMIC_ID.format(0)]
    film.pretrain = False
    film.more = dict(race="asian", weight=150 * 0.45359237, bmi=24.5, sex="F", age=52.0)
    films[MIMIC_ID.format(0)] = film
    return Tree(mimic.raw, films, dict(mimic_iv_dir=str(raw)), left_out={"not frontal, or with a finding": 7})


TREES = {
    "brax": brax, "chexpert": chexpert, "mimic_cxr": mimic_cxr, "chestx_ray14": chestx_ray14, "padchest": padchest,
    "vindr_cxr": vindr_cxr, "candid_ptx": candid_ptx, "rsna_pneumonia": rsna_pneumonia, "mimic_lungs": mimic_lungs,
    "chest_imagenome": chest_imagenome, "vindr_ribcxr": vindr_ribcxr, "iu_xray": iu_xray, "mimic_iv": mimic_iv,
}  # fmt: skip
