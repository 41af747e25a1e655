"""What synthetic reports say: every sentence read back to what was drawn, and F1 against cases worked by hand."""

import numpy as np
import pytest

from raddino_jax.data import synthetic
from raddino_jax.data.anatomy import SIDES
from raddino_jax.evals import facts, report_scores


def drawn(case) -> set:
    """The findings of a film with their places, from what it was drawn with rather than from what is said."""
    found = set()
    for name, site in (case.findings | case.devices).items():
        if name == "effusion":
            found |= {(name, SIDES[side]) for side in site["sides"]}
        elif name == "nodule":
            found |= {(name, synthetic.zone(one)) for one in site["sites"]}
        elif name == "opacity":
            found.add((name, synthetic.zone(site)))
        elif name == "cardiomegaly" or (name == "tube" and site["kind"] != "chest tube"):
            found.add((name, ""))
        else:
            found.add((name, SIDES[site["side"]]))
    return found


@pytest.mark.parametrize("seed", [0, 3])
def test_every_sentence_says_what_was_drawn(seed):
    cases = [synthetic.case(i, seed) for i in range(4000)]
    assert {name for case in cases for name in (*case.findings, *case.devices)} == set(facts.NAMES)
    for case in cases:
        assert facts.facts(synthetic.sentence(case)) == drawn(case), synthetic.sentence(case)


@pytest.mark.parametrize("text, expected", [
    ("Small bilateral pleural effusions.", {("effusion", "right"), ("effusion", "left")}),
    ("Nodules in the right upper zone and the left mid zone. Cardiomegaly.",
     {("nodule", "right upper"), ("nodule", "left mid"), ("cardiomegaly", "")}),
    ("Fractures of the left third and fourth ribs. Right chest tube in place.",
     {("fracture", "left"), ("tube", "right")}),
    ("Clear lungs, normal heart size, no acute abnormality.", set()),
    ("", set()),
    ("Nodule in the right upper", set()),  # the text ended before it said where
    ("Small pleural effusion. No cardiomegaly. Large upper pneumothorax. Nodule in the right zone.", set()),
    ("cardiomegaly.CARDIOMEGALY. Cardiomegaly", {("cardiomegaly", "")}),
])  # fmt: skip
def test_what_cannot_be_read_is_no_finding(text, expected):
    assert facts.facts(text) == expected


def scores(references, texts, placed=True):
    found = facts.statistics(references, texts, placed)
    return found.scores(found.per_report.sum(0))


def test_f1_by_hand():
    truth = ["Small left pleural effusion. Cardiomegaly.", "Nodule in the left mid zone.", "Cardiomegaly."]
    said = ["Large left pleural effusion.", "Nodule in the left upper zone.", "Cardiomegaly. Left chest pacemaker."]
    found = scores(truth, said)
    # right: effusion, cardiomegaly; wrong: nodule, pacemaker; missed: cardiomegaly, nodule.
    assert found["micro"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))
    assert found["effusion"] == 1 and found["cardiomegaly"] == pytest.approx(2 / 3)
    assert found["nodule"] == found["pacemaker"] == found["fracture"] == 0
    assert found["macro"] == pytest.approx((1 + 2 / 3) / len(facts.NAMES))
    anywhere = scores(truth, said, placed=False)
    assert anywhere["nodule"] == 1 and anywhere["micro"] == pytest.approx(6 / (6 + 1 + 1))


def test_the_same_texts_score_one_and_others_nothing():
    texts = [synthetic.sentence(synthetic.case(i)) for i in range(300)]
    same = scores(texts, texts)
    assert all(value == 1 for value in same.values())
    assert all(value == 0 for value in scores(texts, [""] * 300).values())
    assert 0 < scores(texts, texts[150:] + texts[:150])["micro"] < 0.5


def test_rows_have_the_bootstrap_of_the_other_scores():
    texts = [synthetic.sentence(synthetic.case(i)) for i in range(100)]
    said = texts[:50] + texts[:50]
    metrics = {"findings_f1": lambda references, candidates, _: facts.statistics(references, candidates)}
    rows = report_scores.score(texts, said, metrics=metrics, resamples=200, dataset="synthetic")
    assert {row["metric"] for row in rows} == {"findings_f1"} and len(rows) == 2 + len(facts.NAMES)
    micro = next(row for row in rows if row["class"] == "micro")
    low, high = micro["interval"]
    assert low < micro["whole"] < high and micro["whole"] == pytest.approx(scores(texts, said)["micro"])
    draws = np.random.default_rng(0).integers(0, 100, (200, 100))
    again = [scores([texts[i] for i in row], [said[i] for i in row])["micro"] for row in draws[:3]]
    found = report_scores.bootstrap(facts.statistics(texts, said), 200)["micro"][:3]
    np.testing.assert_allclose(found, again, atol=1e-12)
