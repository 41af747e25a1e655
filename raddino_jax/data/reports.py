"""The Findings section of radiology reports: MIMIC-CXR's text files, and the XML of IU X-ray.

MIMIC-CXR's reports are cut into sections by the rules that its curators published with the set (MIT-LCP/mimic-cxr,
txt/section_parser.py and create_section_files.py, MIT licence), written anew here: the tables below are theirs. Whoever
has their output, mimic_cxr_sectioned.csv, may read that instead: `read_sectioned`.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from raddino_jax.data.datasets import manifest
from raddino_jax.data.datasets.manifest import ManifestError

# A heading opens a line, after one space, in capitals, and ends in a colon and white space.
HEADING = re.compile(r"\n ([A-Z ()/,-]+):\s")

# Names of sections as the reports spell them -> what they are. The order of the curators' rules: these, then a main
# section whose name occurs in the heading, then a heading that only names the film, whose text is then the findings.
TITLES = {
    name: title
    for title, names in {
        "preamble": ("preamble",),
        "impression": (
            "impression", "conclusion", "findings and impression", "findings/impression", "findings/ impression",
            "ndication", "impresson", "imprression", "imoression", "impressoin", "imprssion", "impresion",
            "imperssion", "mpression", "impession",
        ),
        "comparison": (
            "comparison", "comparisons", "reference exam", "comparison exam", "comparison film", "comparision",
            "comparsion", "comparrison", "comparisions",
        ),
        "indication": (
            "indication", "reason for examination", "reason for exam", "clinical indication", "idication",
        ),
        "findings": (
            "findings", "chest, two views", "finding", "findins", "findindgs", "findgings", "findngs", "findnings",
            "finidngs", "reference findings",
        ),
        "examination": ("examination", "exam", "type of examination"),
        "technique": ("technique",),
        "history": ("history", "clinical history", "clinical information", "patient history", "pfi"),
        "notification": ("notification",),
        "recommendations": ("recommendations", "recommendation(s)", "recommendation"),
        "addendum": ("addendum",),
        "date": ("date",),
        "comment": ("comment",),
        "wet read": ("wet read", "wetread"),
    }.items()
    for name in names
}  # fmt: skip
MAIN = ("impression", "findings", "history", "comparison", "addendum")
FILM = re.compile(
    "chest|portable|pa and lateral|lateral and pa|ap and lateral|lateral and ap|frontal and|two views|frontal view|"
    "pa view|ap view|one view|lateral view|bone window|frontal upright|frontal semi-upright|ribs|pa and lat"
)

# Studies that the curators looked at by hand: the section, or the characters, that hold what the report says. Their
# table of sections has no row for these, so they have no findings either.
BY_HAND: dict[str, str | tuple[int, int]] = {
    **dict.fromkeys(
        ("s50913680", "s59768032", "s59067458", "s59087630", "s58157373", "s56482935", "s58375018"), "recommendations"
    ),
    **dict.fromkeys(
        ("s57936451", "s50058765", "s51966317", "s55124749", "s54365831", "s54654948"), "indication"
    ),
    **dict.fromkeys(("s59363654", "s53356173", "s50743547", "s59215320", "s55157853"), "examination"),
    **dict.fromkeys(("s59279892", "s53202765", "s50808053"), "technique"),
    "s56451190": "note", "s51491012": "history",
    "s50525523": (201, 349), "s57564132": (233, 554), "s59982525": (313, 717), "s53488209": (149, 475),
    "s54875119": (234, 988), "s50196495": (59, 399), "s56579911": (59, 218), "s52648681": (292, 631),
    "s59889364": (172, 453), "s53514462": (73, 377), "s59505494": (59, 450), "s53182247": (59, 412),
    "s51410602": (47, 320), "s56412866": (522, 822), "s54986978": (59, 306), "s59003148": (262, 505),
    "s57150433": (61, 394), "s56760320": (219, 457), "s59562049": (158, 348), "s52674888": (145, 296),
    "s55258338": (192, 568), "s59330497": (140, 655), "s52119491": (179, 454),
    # No findings in the whole report.
    **dict.fromkeys(
        ("s58235663", "s50798377", "s54168089", "s53071062", "s56724958", "s54231141", "s53607029", "s52035334"), (0, 0)
    ),
}  # fmt: skip

TEXTS = ("indication", "comparison", "findings", "impression")  # of IU X-ray


def clean(text: str) -> str:
    """White space as single spaces; words taken out ("___", "XXXX") stay."""
    return " ".join(text.split())


# --- MIMIC-CXR ------------------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """{title: text} of a report, as it stands there; of several sections with one title the last.

    A report without headings is one "full report". Empty findings and impressions are no sections. Where neither is
    left then, what follows the first paragraph of the last section is its "last_paragraph".
    """
    found = [(_title(name), body) for name, body in _split(text)]
    found = [(title, body) for title, body in found if body.strip() or title not in ("findings", "impression")]
    if not {"findings", "impression"} & {title for title, _ in found}:
        title, body = found.pop()
        first, blank_line, rest = body.partition("\n \n")
        found.append((title, first))
        if blank_line:
            found.append(("last_paragraph", rest))
    return dict(found)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """(heading, text until the next one)."""
    heading = HEADING.search(text)
    if heading is None:
        yield "full report", text
        return
    yield "preamble", text[: heading.start(1)]
    while heading is not None:
        begin = heading.end()
        line_end = text.find("\n", begin)  # what looks like a heading in this line is part of the text
        following = HEADING.search(text, line_end if line_end >= 0 else begin)
        yield heading[1], text[begin : following.start() if following else len(text)]
        heading = following


def _title(heading: str) -> str:
    name = heading.lower().strip()
    if name in TITLES:
        return TITLES[name]
    main = next((title for title in MAIN if title in name), None)
    return main or ("findings" if FILM.search(name) else name)


def findings(text: str, study: str = "") -> str:
    """The cleaned Findings section of a MIMIC-CXR report, "" where it has none.

    study: "s" and its number; studies of BY_HAND have none.
    """
    return "" if study in BY_HAND else clean(sections(text).get("findings", ""))


def conclusion(text: str, study: str = "") -> str:
    """What the report says in the end, cleaned: impression, else findings, last paragraph or comparison; "" for none.

    This is the text that the set's own labels were made from.
    """
    by_hand = BY_HAND.get(study)
    if isinstance(by_hand, tuple):
        return clean(text[slice(*by_hand)])
    found = sections(text)
    titles = (by_hand,) if by_hand else ("impression", "findings", "last_paragraph", "comparison")
    return clean(next((found[title] for title in titles if title in found), ""))


def read_mimic(folder: Path) -> Iterator[tuple[str, str]]:
    """(study, findings) of every report below a folder (mimic-cxr-reports.zip, unpacked) that has findings.

    Raises ManifestError where there is no report.
    """
    paths = sorted(Path(folder).rglob("s*.txt"))
    if not paths:
        raise ManifestError(f"{folder} holds no report sSTUDY.txt; it is the folder of mimic-cxr-reports.zip, unpacked")
    for path in paths:
        text = findings(path.read_text(encoding="utf-8", errors="replace"), path.stem)
        if text:
            yield path.stem, text


def read_sectioned(path: Path) -> Iterator[tuple[str, str]]:
    """(study, findings) of the curators' own mimic_cxr_sectioned.csv, gzipped or not, where there are findings."""
    for row in manifest.rows(Path(path), ["study", "findings"]):
        if row["findings"]:
            yield row["study"], clean(row["findings"])


# --- IU X-ray -------------------------------------------------------------------------------------------------


def read_xml(source: Path | bytes) -> tuple[dict[str, str], list[str]]:
    """An Open-i report -> ({title of TEXTS: cleaned text, "" for none}, names of its films without suffix).

    source: a file, or its bytes. Raises ManifestError where it is no such report.
    """
    try:
        root = ElementTree.fromstring(source if isinstance(source, bytes) else Path(source).read_bytes())
    except ElementTree.ParseError as error:
        raise ManifestError(f"{_name(source)}: expected an Open-i report in XML ({error})") from None
    texts: dict[str, str] = {}
    for part in root.iter("AbstractText"):
        title, text = part.get("Label", "").lower(), clean("".join(part.itertext()))
        texts[title] = f"{texts[title]} {text}".strip() if title in texts else text
    if root.tag != "eCitation" or not texts:
        raise ManifestError(f"{_name(source)}: expected an Open-i report (eCitation), found <{root.tag}>")
    return {title: texts.get(title, "") for title in TEXTS}, [image.get("id", "") for image in root.iter("parentImage")]


def _name(source: Path | bytes) -> str:
    return "the report" if isinstance(source, bytes) else str(source)
