"""Demographics (paper, C.6): frontal MIMIC-CXR films without finding, joined with the patients of MIMIC-IV 2.2.

Layout: the raw folder is MIMIC-CXR's; `--mimic_iv_dir` holds hosp/patients.csv.gz, hosp/admissions.csv.gz and
hosp/omr.csv.gz. Age at the study is anchor_age + year of the study - anchor_year. Weight and BMI are the measurements
nearest to the study, pounds turned into kilograms, outside 20 to 300 kg or 10 to 80 thrown away. Race is the most
frequent of the admissions, the latest of equally frequent ones.
"""

import datetime
from collections import Counter, defaultdict
from pathlib import Path

from raddino_jax.data.datasets import manifest, mimic_cxr
from raddino_jax.data.datasets.manifest import CHEXPERT_LABELS, NAN, Manifest

LICENCE = mimic_cxr.LICENCE
OBTAIN = "https://physionet.org/content/mimiciv/2.2/ (credentialed access), and MIMIC-CXR"

RACES = {  # beginning of MIMIC-IV's word -> class of the paper; "" leaves the race unknown
    "WHITE": "white", "ASIAN": "asian", "BLACK": "black/african american", "HISPANIC": "hispanic/latino",
    "SOUTH AMERICAN": "hispanic/latino", "AMERICAN INDIAN": "american indian/alaska native",
    "UNKNOWN": "", "UNABLE": "", "PATIENT DECLINED": "",
}  # fmt: skip
KILOGRAMS = {"Weight (Lbs)": 0.45359237, "Weight": 0.45359237}
BMI = ("BMI (kg/m2)", "BMI")


def read(raw: Path, *, mimic_iv_dir: str = "", tables: str = "") -> Manifest:
    """mimic_iv_dir: raw folder of MIMIC-IV. tables: as for mimic_cxr."""
    hospital = manifest.other_tree("mimic_iv_dir", mimic_iv_dir, "MIMIC-IV, with hosp/ in it")
    found = mimic_cxr.read(raw, tables=tables)
    metadata = manifest.find(Path(tables or raw), *mimic_cxr._names("metadata"))
    dates = {row["dicom_id"]: _day(row["StudyDate"]) for row in manifest.rows(metadata, ["dicom_id", "StudyDate"])}
    healthy = CHEXPERT_LABELS.index("No Finding")
    films = [film for film in found.films if film.view == "frontal" and film.labels[healthy] == 1]
    subjects = {film.patient for film in films}
    people, races = _people(hospital), _races(hospital, subjects)
    weights, bmis = _measured(hospital, subjects)
    joined = Manifest(labels=found.labels, more={"race": str, "weight": float, "bmi": float}, notes=found.notes)
    joined.dropped["not frontal, or with a finding"] = len(found.films) - len(films)
    for film in films:
        if film.patient not in people:
            joined.dropped["patient not in MIMIC-IV"] += 1
            continue
        day = dates[film.id]
        film.sex, at_anchor, anchor = people[film.patient]
        film.age, film.pretrain = at_anchor + day.year - anchor, False
        measured = (_nearest(weights[film.patient], day), _nearest(bmis[film.patient], day))
        film.more = [races.get(film.patient, ""), *measured]
        joined.films.append(film)
    reason = "films without weight or BMI are kept here with NaN; the paper's selection is unpublished"
    joined.compare("films", 60_100, len(joined.films), reason)
    return joined


def _day(text: str) -> datetime.date:
    """"21800506" or "2180-05-06"."""
    digits = text.replace("-", "")
    return datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:8]))


def _people(hospital: Path) -> dict[str, tuple[str, float, int]]:
    """subject -> (sex, age at the anchor, anchor year)."""
    table = manifest.find(hospital, "hosp/patients.csv.gz", "hosp/patients.csv")
    return {
        row["subject_id"]: (manifest.sex(row["gender"]), float(row["anchor_age"]), int(row["anchor_year"]))
        for row in manifest.rows(table, ["subject_id", "gender", "anchor_age", "anchor_year"])
    }


def _races(hospital: Path, subjects: set[str]) -> dict[str, str]:
    told = defaultdict(list)
    table = manifest.find(hospital, "hosp/admissions.csv.gz", "hosp/admissions.csv")
    for row in manifest.rows(table, ["subject_id", "admittime", "race"]):
        race = _race(row["race"])
        if race and row["subject_id"] in subjects:
            told[row["subject_id"]].append((row["admittime"], race))
    found = {}
    for subject, admissions in told.items():
        counts = Counter(race for _, race in admissions)
        most = max(counts.values())
        found[subject] = next(race for _, race in sorted(admissions, reverse=True) if counts[race] == most)
    return found


def _race(text: str) -> str:
    known = (race for start, race in RACES.items() if text.upper().startswith(start))
    return next(known, "other") if text else ""


def _measured(hospital: Path, subjects: set[str]) -> tuple[dict, dict]:
    """subject -> [(day, value)] of weight in kilograms and of BMI."""
    weights, bmis = defaultdict(list), defaultdict(list)
    table = manifest.find(hospital, "hosp/omr.csv.gz", "hosp/omr.csv")
    for row in manifest.rows(table, ["subject_id", "chartdate", "result_name", "result_value"]):
        if row["subject_id"] not in subjects:
            continue
        value = manifest.number(row["result_value"])
        if row["result_name"] in KILOGRAMS:
            value *= KILOGRAMS[row["result_name"]]
            if 20 <= value <= 300:
                weights[row["subject_id"]].append((_day(row["chartdate"]), value))
        elif row["result_name"] in BMI and 10 <= value <= 80:
            bmis[row["subject_id"]].append((_day(row["chartdate"]), value))
    return weights, bmis


def _nearest(measured: list, day: datetime.date) -> float:
    return min(measured, key=lambda one: (abs(one[0] - day), one[0]))[1] if measured else NAN
