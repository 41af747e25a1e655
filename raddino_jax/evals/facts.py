"""What a report of a synthetic film says, as findings with their places, and how much of it is so.

A finding is (name, where): ("effusion", "left"), ("nodule", "right upper"), ("fracture", "left"), ("cardiomegaly", ""),
("line", "right"). The sentences are those of `data.synthetic.sentence`; sizes, kinds and ribs are not compared. What
cannot be read, or is said of no known place, is no finding.
"""

import re
from collections.abc import Sequence

import numpy as np

from raddino_jax.data.anatomy import SIDES, ZONES
from raddino_jax.data.synthetic import DEVICES, FINDINGS
from raddino_jax.evals.report_scores import Statistics

Fact = tuple[str, str]

SIDE = rf"(?P<side>{'|'.join(SIDES)})"
ZONE = rf"(?:{'|'.join(ZONES)}) zone"
# Whole sentences, in small letters and without their full stop -> the name of the finding.
SENTENCES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(?:small|moderate|large) (?P<both>bilateral) pleural effusions", "effusion"),
        (rf"(?:small|moderate|large) {SIDE} pleural effusion", "effusion"),
        (rf"(?:small|large) {SIDE} pneumothorax", "pneumothorax"),
        (rf"nodules? in the (?P<zones>{ZONE}(?: and the {ZONE})*)", "nodule"),
        (rf"(?:reticular|airspace) opacity in the (?P<zones>{ZONE})", "opacity"),
        (r"cardiomegaly", "cardiomegaly"),
        (rf"fractures? of the {SIDE} \w+(?: and \w+)* ribs?", "fracture"),
        (rf"{SIDE} chest tube in place", "tube"),
        (r"(?:endotracheal|nasogastric) tube in place", "tube"),
        (rf"{SIDE} (?:jugular|subclavian) central venous line", "line"),
        (rf"{SIDE} chest pacemaker", "pacemaker"),
    )
]
NAMES = (*FINDINGS, *DEVICES)


def facts(text: str) -> set[Fact]:
    """The findings that a text says are there, each with each of its places."""
    found = set()
    for sentence in text.lower().split("."):
        for pattern, name in SENTENCES:
            if match := pattern.fullmatch(sentence.strip()):
                found |= {(name, place) for place in _places(match.groupdict())}
    return found


def _places(groups: dict) -> Sequence[str]:
    if groups.get("both"):
        return SIDES
    if groups.get("zones"):
        return [zone.removesuffix(" zone") for zone in groups["zones"].split(" and the ")]
    return [groups.get("side") or ""]


def statistics(references: Sequence[str], candidates: Sequence[str], placed: bool = True) -> Statistics:
    """For `report_scores`: right, wrongly said and missed findings, per report and name of NAMES.

    Scores: F1 per name; "macro", the mean of those; "micro", of all findings together. A name that nobody has and
    nobody says scores 0. placed: whether a finding in another place counts as wrong, and not as the same.
    """
    per_report = np.zeros((len(references), 3, len(NAMES)))
    for row, texts in zip(per_report, zip(references, candidates, strict=True), strict=True):
        truth, said = ({fact if placed else (fact[0], "") for fact in facts(text)} for text in texts)
        for k, part in enumerate((truth & said, said - truth, truth - said)):
            for name, _ in part:
                row[k, NAMES.index(name)] += 1
    signature = "findings of synthetic sentences" + (", with side or zone" if placed else ", wherever they are")
    return Statistics(per_report.reshape(len(references), -1), _f1, {"signature": signature})


def _f1(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Of sums [..., 3 x names]."""
    right, wrong, missed = np.split(sums, 3, axis=-1)
    each = _of(right, wrong, missed)
    together = _of(*(part.sum(-1) for part in (right, wrong, missed)))
    return {"macro": each.mean(-1), "micro": together} | {name: each[..., i] for i, name in enumerate(NAMES)}


def _of(right, wrong, missed):
    return 2 * right / np.maximum(2 * right + wrong + missed, 1)
