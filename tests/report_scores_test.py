"""Scores of reports against the public packages, and their bootstrap against a plain loop."""

import json
import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from sklearn.metrics import f1_score

from raddino_jax.evals import report_scores

FULL = "Heart size is normal. There is a small left pleural effusion, no pneumothorax."
PAIRS = {  # reference, generated
    "identical": (FULL, FULL),
    "empty": (FULL, ""),
    "empty reference": ("", FULL),
    "disjoint": (FULL, "xylophone quartz vivid"),
    "partial": (FULL, "The heart is normal in size. No pneumothorax or pleural effusion."),
    "short": ("Clear lungs.", "Lungs clear."),
    "same stems": ("Effusions improved.", "Effusion improving."),  # no stemmer is used
    "long": (FULL * 3, FULL + " Bibasilar atelectasis."),
}
REFERENCES, CANDIDATES = (list(texts) for texts in zip(*PAIRS.values(), strict=True))


def value(rows, metric, name="macro", stratum="", field="whole"):
    return row_of(rows, metric, name, stratum)[field]


def row_of(rows, metric, name="macro", stratum=""):
    (row,) = [r for r in rows if (r["metric"], r["class"], r["stratum"]) == (metric, name, stratum)]
    return row


@pytest.mark.parametrize("kind", [*PAIRS, "all"])
def test_rouge_l_and_bleu_4_are_those_of_the_packages(kind):
    references, candidates = (REFERENCES, CANDIDATES) if kind == "all" else ([text] for text in PAIRS[kind])
    rows = report_scores.score(references, candidates, resamples=3)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rouge = np.mean([scorer.score(r, c)["rougeL"].fmeasure for r, c in zip(references, candidates, strict=True)])
    bleu = sacrebleu.corpus_bleu(candidates, [references])
    assert value(rows, "rouge_l") == pytest.approx(rouge, abs=1e-12)
    assert value(rows, "bleu_4") == pytest.approx(bleu.score / 100, abs=1e-12)


def test_identical_is_one_and_disjoint_or_empty_is_nothing():
    found = {kind: report_scores.score([r], [c], resamples=2) for kind, (r, c) in PAIRS.items()}
    for metric in ("rouge_l", "bleu_4"):
        assert value(found["identical"], metric) == pytest.approx(1)
        assert value(found["disjoint"], metric) == value(found["empty"], metric) == 0
        assert 0 < value(found["partial"], metric) < 1


def test_bleu_tells_how_it_was_made(capsys):
    rows = report_scores.score(REFERENCES, CANDIDATES, resamples=2)
    assert f"tok:13a|smooth:exp|version:{sacrebleu.__version__}" in value(rows, "bleu_4", field="signature")
    assert value(rows, "bleu_4", field="signature") in capsys.readouterr().err


# --- the bootstrap --------------------------------------------------------------------------------------------


def test_the_bootstrap_is_a_plain_loop_over_resampled_reports():
    """The same draws, each resample scored from its texts by the packages."""
    rows = report_scores.score(REFERENCES, CANDIDATES, resamples=40, seed=5)
    n, draw = len(REFERENCES), np.random.default_rng(5)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    found = {"rouge_l": [], "bleu_4": []}
    for chosen in draw.integers(0, n, (40, n)):
        references, candidates = [REFERENCES[i] for i in chosen], [CANDIDATES[i] for i in chosen]
        pairs = zip(references, candidates, strict=True)
        found["rouge_l"].append(np.mean([scorer.score(r, c)["rougeL"].fmeasure for r, c in pairs]))
        found["bleu_4"].append(sacrebleu.corpus_bleu(candidates, [references]).score / 100)
    for metric, values in found.items():
        assert value(rows, metric, field="value") == pytest.approx(np.median(values), abs=1e-9)
        np.testing.assert_allclose(
            value(rows, metric, field="interval"), np.percentile(values, [2.5, 97.5]), atol=1e-9
        )
        assert value(rows, metric, field="std") == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_macro_f1_of_resamples_is_sklearns():
    rng = np.random.default_rng(0)
    truth, found = rng.random((2, 30, 14)) < 0.3
    truth[:, 4] = found[:, 4] = False  # a class that nobody has
    per_report = np.concatenate([truth & found, ~truth & found, truth & ~found], axis=1).astype(float)
    statistics = report_scores.Statistics(per_report, report_scores._f1_per_class)
    values = report_scores.bootstrap(statistics, 20, seed=1)
    for i, chosen in enumerate(np.random.default_rng(1).integers(0, 30, (20, 30))):
        expected = f1_score(truth[chosen], found[chosen], average=None, zero_division=0)
        assert values["macro"][i] == pytest.approx(expected.mean())
        assert values["Cardiomegaly"][i] == pytest.approx(expected[1])


def test_strata_are_scored_apart_and_the_worst_is_named():
    group = ["a", "b", "a", "b", "a", "a", "", "nan"]
    about = dict(dataset="x", data="synthetic")
    rows = report_scores.score(REFERENCES, CANDIDATES, strata={"sex": group}, resamples=30, **about)
    inside = [i for i, g in enumerate(group) if g == "b"]
    alone = report_scores.score([REFERENCES[i] for i in inside], [CANDIDATES[i] for i in inside], resamples=30)
    for field in ("value", "interval", "whole", "n"):
        assert value(rows, "rouge_l", stratum="sex=b", field=field) == value(alone, "rouge_l", field=field)
    assert value(rows, "rouge_l", stratum="sex=a", field="n") == 4
    assert value(rows, "rouge_l", stratum="sex: worst", field="worst") == "sex=b"
    assert value(rows, "rouge_l", stratum="sex: worst") == value(rows, "rouge_l", stratum="sex=b")
    assert all(row["dataset"] == "x" and row["data"] == "synthetic" for row in rows)
    everyone, worst = row_of(rows, "rouge_l"), row_of(rows, "rouge_l", stratum="sex: worst")
    assert row_of(rows, "rouge_l", stratum="sex: all") == everyone | {"stratum": "sex: all"}
    assert worst["gap"] == abs(everyone["value"] - worst["value"]) > 0
    json.dumps(rows)


def test_a_group_of_one_report_is_listed_but_not_the_worst():
    rouge_l = {"rouge_l": report_scores.METRICS["rouge_l"]}
    references, candidates = ["clear lungs"] * 5, ["clear lungs", "clear heart", "clear lungs", "lungs", "no"]
    strata = {"sex": ["a", "a", "b", "b", "c"], "ward": list("xyzuv")}
    rows = report_scores.score(references, candidates, strata=strata, resamples=30, metrics=rouge_l)
    assert value(rows, "rouge_l", stratum="sex=c") == 0
    assert value(rows, "rouge_l", stratum="sex: worst", field="worst") in ("sex=a", "sex=b")
    assert "ward: worst" not in {row["stratum"] for row in rows}
    rows = report_scores.score(references, candidates, strata=strata, resamples=30, metrics=rouge_l, smallest=1)
    assert value(rows, "rouge_l", stratum="sex: worst", field="worst") == "sex=c"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((["a"], []), "found 0 and 1"),
        (([], []), "found 0 and 0"),
        ((["a"], ["a"], {"chexbret": "x"}), "chexbret"),
        ((["a"], ["a"], {}, {"sex": ["F", "M"]}), "expected 1 values, found 2"),
    ],
)
def test_lists_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        report_scores.score(*arguments)


# --- graders that are elsewhere -------------------------------------------------------------------------------


def test_a_grader_that_is_not_there_is_null_with_the_reason(monkeypatch, capsys):
    for name in ("rouge_score", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = report_scores.score(REFERENCES, CANDIDATES)
    assert [row["metric"] for row in rows] == ["rouge_l", "bleu_4", "rg_er", "chexbert_f1"]
    assert all(row["value"] is None and row["n"] == len(REFERENCES) for row in rows)
    reasons = [row["reason"] for row in rows]
    assert "raddino_jax[report]" in reasons[0] and "raddino_jax[report]" in reasons[1]
    assert "not installed" in reasons[2] and "graders.chexbert=PATH" in reasons[3]
    assert all(reason in capsys.readouterr().err for reason in [reasons[3]])


FAKE = '''
class RadGraph:
    """Every capitalised word is an anatomy, and has a relation where a comma follows."""
    def __init__(self, model_type, model_cache_dir="cache"):
        assert model_type == "radgraph"
        print("Using device: none")
    def __call__(self, texts):
        words = [[w for w in text.split() if w[0].isupper()] for text in texts]
        return {str(i): {"entities": {str(j): {"tokens": w.strip(","), "label": "ANAT-DP",
                "relations": [["located_at", "0"]] if "," in w else []} for j, w in enumerate(ws)}}
                for i, ws in enumerate(words)}
'''


def tagger(folder, code: str):
    """An interpreter whose `radgraph` is a module of the test."""
    (folder / "radgraph.py").write_text(code)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_rg_er_comes_from_a_tagger_in_another_environment(tmp_path):
    references = ["Heart, and Lung", "Heart Lung", "Heart", "nothing", ""]
    candidates = ["Heart, and Lung", "Heart, Rib", "", "Heart", "Heart"]
    graders = {"radgraph_python": tagger(tmp_path, FAKE)}
    rows = report_scores.score(references, candidates, graders, resamples=5)
    assert value(rows, "rg_er") == pytest.approx(1 / 5)  # identical, a relation too many, three without entities
    rows = report_scores.score(["Heart Lung Rib"], ["Heart Lung"], graders, resamples=5)
    assert value(rows, "rg_er") == pytest.approx(0.8)


@pytest.mark.parametrize(
    "code, words",
    [
        ("raise ImportError('No module named dotmap')", "dotmap.*raddino_jax.graders"),
        ("class RadGraph:\n def __init__(self, **_): raise OSError('offline')", "OSError: offline"),
        ("import os\nos._exit(3)", "exit code 3"),
    ],
)
def test_a_tagger_that_fails_says_why(tmp_path, code, words):
    with pytest.raises(report_scores.GraderError, match=words):
        report_scores.annotate(["Heart"], python=tagger(tmp_path, code))


def test_a_folder_without_weights_and_an_interpreter_that_is_not_there_are_named(tmp_path):
    with pytest.raises(report_scores.GraderError, match=f"{tmp_path} holds no radgraph/weights.th"):
        report_scores.annotate(["Heart"], weights=str(tmp_path), python=tagger(tmp_path, FAKE))
    with pytest.raises(report_scores.GraderError, match="radgraph_python='/no/python'"):
        report_scores.annotate(["Heart"], python="/no/python")


# --- RadGraph's reward ----------------------------------------------------------------------------------------


def annotation(entities):
    """RadGraph's form of (tokens, label, number of relations)."""
    relations = [[["modify", "0"]] * n for *_, n in entities]
    named = zip(entities, relations, strict=True)
    return {"entities": {str(i): dict(tokens=t, label=k, relations=r) for i, ((t, k, _), r) in enumerate(named)}}


ANAT, SEEN, NONE = "ANAT-DP", "OBS-DP", "OBS-DA"
WHOLE = [("effusion", SEEN, 2), ("left", ANAT, 1), ("small", SEEN, 0), ("pneumothorax", NONE, 0)]
REWARDS = [  # of radgraph 0.1.18's compute_reward(generated, WHOLE, "partial")
    (WHOLE, 1.0),
    ([], 0.0),
    ([("rib", ANAT, 0)], 0.0),
    ([("effusion", SEEN, 0), ("left", ANAT, 1), ("small", SEEN, 3)], 0.28571428571428575),
    ([("Effusion", SEEN, 2), ("left", ANAT, 5)], 0.3333333333333333),
    ([("effusion", NONE, 1), ("left", ANAT, 1), ("left", ANAT, 2)], 0.3333333333333333),
    ([("left", ANAT, 1), ("left", ANAT, 0), ("pneumothorax", NONE, 0), ("small", SEEN, 0)], 0.75),
]


@pytest.mark.parametrize("entities, reward", REWARDS)
def test_the_reward_is_that_of_the_package(entities, reward):
    generated, whole = annotation(entities), annotation(WHOLE)
    assert report_scores.radgraph_f1(generated, whole) == pytest.approx(reward, abs=1e-15)
    assert report_scores.radgraph_f1(whole, generated) == pytest.approx(reward, abs=1e-15)  # an F1 is symmetric
