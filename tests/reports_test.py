"""Findings of reports: every rule on a text made for it, and the 300 real reports of Open-i."""

import csv
import gzip
import tarfile
import xml.etree.ElementTree as ElementTree

import pytest

from raddino_jax.data import reports
from raddino_jax.data.datasets.manifest import ManifestError

TYPICAL = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___ year old woman with cough  // pneumonia?
 
 COMPARISON:  ___
 
 FINDINGS: 
 
 Heart size is normal.  There is no pleural
 effusion or pneumothorax.
 
 IMPRESSION: 
 
 No acute process.
"""  # noqa: W293, W291


def report(*parts: tuple[str, str]) -> str:
    return " FINAL REPORT\n" + "".join(f" {heading}: {text}\n \n" for heading, text in parts)


def test_a_typical_report():
    assert reports.findings(TYPICAL) == "Heart size is normal. There is no pleural effusion or pneumothorax."
    assert reports.conclusion(TYPICAL) == "No acute process."
    titles = ["preamble", "examination", "indication", "comparison", "findings", "impression"]
    assert list(reports.sections(TYPICAL)) == titles


RULES = {
    "words taken out stay, white space is one space": ("FINDINGS", "Seen by  ___\n at ___.", "Seen by ___ at ___."),
    "a typing error of findings": ("FINIDNGS", "Clear.", "Clear."),
    "a heading that holds a main section's name": ("PORTABLE CHEST FINDINGS", "Clear.", "Clear."),
    "a heading that only names the film": ("PA AND LATERAL VIEWS OF THE CHEST", "Clear.", "Clear."),
    "of the main sections impression goes before findings": ("FINDINGS AND IMPRESSIONS", "Clear.", ""),
    "findings and impression are an impression": ("FINDINGS AND IMPRESSION", "Clear.", ""),
    "a conclusion is an impression": ("CONCLUSION", "Clear.", ""),
    "a main section goes before the name of a film": ("COMPARISON CHEST", "None.", ""),
    "findings of a reference": ("REFERENCE FINDINGS", "Clear.", "Clear."),
    "an unknown heading": ("TUBES AND LINES", "Clear.", ""),
}


@pytest.mark.parametrize("rule", RULES)
def test_names_of_sections(rule):
    heading, text, expected = RULES[rule]
    assert reports.findings(report(("INDICATION", "Cough."), (heading, text))) == expected


def test_every_spelling_of_a_title_is_told():
    for spelling, title in reports.TITLES.items():
        assert list(reports.sections(f"\n {spelling.upper()}: text"))[-1] == title, spelling


def test_of_two_findings_the_last_is_taken_unless_it_is_empty():
    twice = report(("CHEST, TWO VIEWS", "First."), ("IMPRESSION", "One."), ("FINDINGS", "Second."))
    assert reports.findings(twice) == "Second."
    assert reports.findings(report(("FINDINGS", "First."), ("CHEST, PA LATERAL", ""))) == "First."


def test_a_heading_needs_its_line_its_space_its_capitals_and_its_colon():
    for heading in ("\n FINDINGS ", "\nFINDINGS: ", "\n Findings: ", " FINDINGS: ", "\n FINDINGS:", "\n FINDINGS 2: "):
        text = f"{heading}Clear."
        assert list(reports.sections(text)) == ["full report"], text
    assert reports.sections("\n FINDINGS:\n")["preamble"] == "\n "


def test_what_looks_like_a_heading_in_the_first_line_of_a_section_is_text():
    """The search goes on after the first line end: here that of the line below the heading."""
    text = "\n INDICATION:\n FINDINGS: not a heading\n IMPRESSION: a heading\n"
    assert reports.sections(text)["indication"] == " FINDINGS: not a heading"
    assert reports.findings(text) == "" and reports.conclusion(text) == "a heading"


def test_without_findings_and_impression_the_rest_of_the_last_section_is_its_last_paragraph():
    text = "\n COMPARISON: None.\n \n PA view.\n \n Clear lungs.\n"
    found = reports.sections(text)
    assert found["comparison"] == "None." and found["last_paragraph"] == " PA view.\n \n Clear lungs.\n"
    assert reports.findings(text) == "" and reports.conclusion(text) == "PA view. Clear lungs."
    assert reports.conclusion("\n COMPARISON: Clear lungs.\n") == "Clear lungs."
    assert reports.conclusion("nothing of use") == ""


def test_studies_judged_by_hand_have_a_conclusion_and_no_findings():
    """As in the curators' table of sections, which has no row for them."""
    text = report(("FINDINGS", "Clear."), ("RECOMMENDATION(S)", "Repeat it."), ("IMPRESSION", "None."))
    assert reports.findings(text, "s50913680") == "" and reports.findings(text, "s1") == "Clear."
    assert reports.conclusion(text, "s50913680") == "Repeat it."
    assert reports.conclusion("x" * 201 + "y" * 148 + "z", "s50525523") == "y" * 148
    assert reports.conclusion(text, "s58235663") == ""
    assert len(reports.BY_HAND) == 54 and sum(v == (0, 0) for v in reports.BY_HAND.values()) == 8


def test_a_folder_of_reports_gives_those_with_findings(tmp_path):
    folder = tmp_path / "files" / "p10" / "p10000032"
    folder.mkdir(parents=True)
    for study, text in {"s2": TYPICAL, "s1": "\n FINDINGS: Old.", "s3": "\n IMPRESSION: None."}.items():
        (folder / f"{study}.txt").write_text(text)
    assert list(reports.read_mimic(tmp_path)) == [("s1", "Old."), ("s2", reports.findings(TYPICAL))]
    with pytest.raises(ManifestError, match="no report sSTUDY.txt"):
        list(reports.read_mimic(tmp_path / "files" / "p11"))


def test_the_curators_own_table_may_be_read_instead(tmp_path):
    path = tmp_path / "mimic_cxr_sectioned.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        table = csv.writer(file)
        table.writerow(["study", "impression", "findings", "last_paragraph", "comparison"])
        table.writerows([["s1", "None.", "Clear\n lungs,  ___.", "", ""], ["s2", "None.", "", "", ""]])
    assert list(reports.read_sectioned(path)) == [("s1", "Clear lungs, ___.")]
    with gzip.open(path, "wt") as file:
        file.write("study,text\ns1,x\n")
    with pytest.raises(ManifestError, match="expected a column findings"):
        list(reports.read_sectioned(path))


# --- IU X-ray -------------------------------------------------------------------------------------------------

XML = """<?xml version="1.0"?><eCitation><Abstract>
<AbstractText Label="COMPARISON"/><AbstractText Label="FINDINGS">Clear <i>lungs</i>,
  XXXX.</AbstractText><AbstractText Label="FINDINGS">No effusion.</AbstractText>
<AbstractText Label="IMPRESSION">Normal.</AbstractText></Abstract>
<parentImage id="CXR1_IM-1"/><parentImage id="CXR1_IM-2"/></eCitation>"""


def test_an_xml_report(tmp_path):
    path = tmp_path / "1.xml"
    path.write_text(XML)
    texts, films = reports.read_xml(path)
    assert texts == dict(comparison="", indication="", findings="Clear lungs, XXXX. No effusion.", impression="Normal.")
    assert films == ["CXR1_IM-1", "CXR1_IM-2"] and reports.read_xml(XML.encode()) == (texts, films)


@pytest.mark.parametrize("content, words", [("<eCitation>", "in XML"), ("<html/>", "found <html>")])
def test_what_is_no_report_is_named(tmp_path, content, words):
    path = tmp_path / "7.xml"
    path.write_text(content)
    with pytest.raises(ManifestError, match=f"7.xml.*{words}"):
        reports.read_xml(path)


def test_the_300_real_reports(cxr):
    """Against a plain look-up of each text; nothing is lost and nothing added."""
    archive = cxr / "reports_text_only" / "openi_reports_xml.tar.xz"
    with tarfile.open(archive) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".xml")}
    assert len(files) == 300
    told = []
    for name, content in files.items():
        texts, films = reports.read_xml(content)
        root = ElementTree.fromstring(content)
        for title, text in texts.items():
            plain = root.find(f".//AbstractText[@Label='{title.upper()}']")
            assert text.split() == (plain.text or "").split(), (name, title)
            assert text == text.strip() and "\n" not in text and "  " not in text
        assert len(films) == content.count(b"<parentImage ") and all(film.startswith("CXR") for film in films)
        told.append(bool(texts["findings"]))
    assert 0.7 < sum(told) / len(told) <= 1  # some reports have an impression only
