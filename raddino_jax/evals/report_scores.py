"""Scores of generated reports: ROUGE-L, BLEU-4, RG_ER, CheXbert's macro F1 over 14 classes (arXiv 2401.10815, E.3.3).

Each score is kept as sums over reports: a row of statistics per report, and a formula that turns summed rows into the
score. One resample of the bootstrap is then one weighted sum, and costs no second look at a text. All scores lie in
[0, 1] (the paper prints them x 100). A grader that is not installed, or has no weights, gives rows with value null and
the reason.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raddino_jax import logs
from raddino_jax.evals import chexbert

RESAMPLES = 500  # of the paper, which reports their median and 95 % interval
UNKNOWN = {"", "nan", "None"}  # strata of reports about which nobody knows

# What graders need from the user: paths; "" where there is none, or where a package knows its own place.
#   radgraph         folder that holds radgraph/{config.json, weights.th, vocabulary}; "" = the package's own cache
#   radgraph_python  the interpreter of an environment with the extra `graders`; "" = this one
#   chexbert, vocab  chexbert.pth of its authors; vocab.txt of bert-base-uncased, "" = beside the checkpoint
GRADERS = dict(radgraph="", radgraph_python="", chexbert="", vocab="")


class GraderError(RuntimeError):
    """A grader that cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Statistics:
    """per_report float64 [n, k]; `scores` turns sums [..., k] into {class: score [...]}; note: fields of rows."""

    per_report: np.ndarray
    scores: Callable[[np.ndarray], dict[str, np.ndarray]]
    note: Mapping = field(default_factory=dict)


def score(
    references: Sequence[str],
    candidates: Sequence[str],
    graders: Mapping[str, str] = GRADERS,
    strata: Mapping[str, Sequence[str]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    smallest: int = 2,
    metrics: Mapping[str, Callable] | None = None,
    **about,
) -> list[dict]:
    """Rows of results.json: one per metric, class and stratum.

    graders: paths as in GRADERS. strata: column -> its value per report (those of UNKNOWN take no part); each value is
    scored apart, a row "column: all" repeats the score of all reports, and "column: worst" the lowest value's, with how
    far it lies from all as "gap". smallest: reports below which a value is listed, but cannot be the worst. metrics:
    name -> what makes Statistics of (references, candidates, graders), METRICS by default. about: further fields of
    every row (dataset, encoder, data, config, ...). value is the median over resamples of reports, interval its 2.5 and
    97.5 percentiles, std their deviation, whole the score of the reports as they are.
    Raises ValueError when the lists differ in length or are empty.
    """
    references, candidates, strata = list(references), list(candidates), dict(strata or {})
    _check(references, candidates, strata, graders)
    logs.say(f"report scores: {len(candidates)} reports, {len(set(candidates))} different texts among the generated")
    rows = []
    for metric, grade in (METRICS if metrics is None else metrics).items():
        try:
            statistics = grade(references, candidates, GRADERS | dict(graders))
        except (GraderError, chexbert.CheXbertError) as error:
            logs.say(f"report scores: {metric} is null: {error}")
            rows.append(_row(metric, "macro", "", len(references), seed, about, None) | {"reason": str(error)})
            continue
        if "signature" in statistics.note:
            logs.say(f"report scores: {metric} is {statistics.note['signature']}")
        rows += _rows(metric, statistics, strata, resamples, seed, smallest, about)
    return rows


def _check(references, candidates, strata, graders) -> None:
    if not references or len(references) != len(candidates):
        raise ValueError(
            f"expected as many generated reports as references, found {len(candidates)} and {len(references)}"
        )
    for column, values in strata.items():
        if len(values) != len(references):
            raise ValueError(f"strata {column!r}: expected {len(references)} values, found {len(values)}")
    unknown = set(graders) - set(GRADERS)
    if unknown:
        raise ValueError(f"graders: expected some of {', '.join(GRADERS)}, found {', '.join(sorted(unknown))}")


# --- rows and the bootstrap -----------------------------------------------------------------------------------


def bootstrap(statistics: Statistics, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    """{class: scores [resamples]}: reports drawn with replacement, the same draws for every metric of n reports."""
    n = len(statistics.per_report)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    times = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(float)
    return statistics.scores(times @ statistics.per_report)


def _rows(metric, statistics, strata, resamples, seed, smallest, about) -> list[dict]:
    whole = _stratum_rows(metric, statistics, "", resamples, seed, about)
    rows = list(whole)
    for column, values in strata.items():
        values = np.array([str(value).strip() for value in values])
        groups = []
        for value in sorted({*values} - UNKNOWN):
            part = Statistics(statistics.per_report[values == value], statistics.scores, statistics.note)
            groups.append(_stratum_rows(metric, part, f"{column}={value}", resamples, seed, about))
        for everyone, *same_class in zip(whole, *groups, strict=True):
            rows += [*same_class, everyone | {"stratum": f"{column}: all"}]
            if large := [row for row in same_class if row["n"] >= smallest]:
                worst = min(large, key=lambda row: row["value"])
                gap = abs(everyone["value"] - worst["value"])
                rows.append(worst | {"stratum": f"{column}: worst", "worst": worst["stratum"], "gap": gap})
    return rows


def _stratum_rows(metric, statistics, stratum, resamples, seed, about) -> list[dict]:
    n = len(statistics.per_report)
    whole = statistics.scores(statistics.per_report.sum(0))
    rows = []
    for name, values in bootstrap(statistics, resamples, seed).items():
        low, median, high = np.percentile(values, [2.5, 50, 97.5])
        row = _row(metric, name, stratum, n, seed, about, float(median))
        row |= dict(std=float(values.std(ddof=1)) if len(values) > 1 else None, interval=[float(low), float(high)])
        rows.append(row | dict(whole=float(whole[name]), resamples=resamples) | dict(statistics.note))
    return rows


def _row(metric, name, stratum, n, seed, about, value) -> dict:
    row = dict(task="report", dataset="", encoder="", metric=metric, value=value, std=None, n=n, folds=1, seed=seed)
    return row | {"class": name, "stratum": stratum} | about


def _mean(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Of rows (value, 1)."""
    return {"macro": sums[..., 0] / sums[..., 1]}


def _averaged(values: Sequence[float], **note) -> Statistics:
    return Statistics(np.stack([np.asarray(values, float), np.ones(len(values))], axis=1), _mean, note)


# --- words ----------------------------------------------------------------------------------------------------


def _rouge_l(references, candidates, graders) -> Statistics:
    """Mean over reports of the F1 of the longest common subsequence, without stemming."""
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise GraderError("rouge-score is not installed: pip install 'raddino_jax[report]'") from None
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    values = [scorer.score(r, c)["rougeL"].fmeasure for r, c in zip(references, candidates, strict=True)]
    return _averaged(values, signature="rouge-score rougeL F1, no stemmer")


def _bleu_4(references, candidates, graders) -> Statistics:
    """BLEU of the corpus, from lengths and counts of n-grams per report."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise GraderError("sacrebleu is not installed: pip install 'raddino_jax[report]'") from None
    counting = BLEU(effective_order=True)  # so that it does not warn of single reports; counts are the same
    found = [counting.sentence_score(c, [r]) for r, c in zip(references, candidates, strict=True)]
    per_report = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in found], float)
    corpus = BLEU()
    corpus.corpus_score(candidates, [references])  # after which it knows its signature

    def scores(sums):
        rows = sums.reshape(-1, sums.shape[-1]).astype(int)
        values = [_bleu_of(row, BLEU.compute_bleu) for row in rows.tolist()]
        return {"macro": np.array(values).reshape(sums.shape[:-1])}

    return Statistics(per_report, scores, {"signature": f"sacrebleu {corpus.get_signature()}"})


def _bleu_of(row: list[int], compute) -> float:
    ours, theirs, *counts = row
    return compute(counts[:4], counts[4:], ours, theirs, smooth_method="exp").score / 100


# --- RadGraph -------------------------------------------------------------------------------------------------


def radgraph_f1(candidate: Mapping, reference: Mapping) -> float:
    """RG_ER of two annotations {"entities": {id: {"tokens", "label", "relations"}}}.

    F1 over the sets of (tokens, label, whether it has any relation); 0 where one of them has no entity.
    """
    ours, theirs = (
        {(e["tokens"], e["label"], bool(e["relations"])) for e in annotation["entities"].values()}
        for annotation in (candidate, reference)
    )
    if not ours or not theirs:
        return 0.0
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def _rg_er(references, candidates, graders) -> Statistics:
    """Mean over reports; a report without text on either side counts as 0, as in the package."""
    pairs = list(zip(references, candidates, strict=True))
    texts = sorted({text for pair in pairs if all(pair) for text in pair})
    annotations = dict(zip(texts, annotate(texts, graders["radgraph"], graders["radgraph_python"]), strict=True))
    values = [radgraph_f1(annotations[c], annotations[r]) if r and c else 0.0 for r, c in pairs]
    return _averaged(values, signature="radgraph v1, reward partial")


def annotate(texts: Sequence[str], weights: str = "", python: str = "") -> list[dict]:
    """RadGraph's annotations of texts, by its own tagger in a process of its own.

    weights, python: as in GRADERS. Raises GraderError with the tagger's last words.
    """
    if not texts:
        return []
    logs.say(f"report scores: RadGraph reads {len(texts)} texts")
    script = Path(__file__).with_name("radgraph_tagger.py")
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "texts.json", Path(folder) / "annotations.json"
        given.write_text(json.dumps(list(texts)))
        command = [python or sys.executable, str(script), str(given), str(found), weights]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            raise GraderError(f"graders.radgraph_python={python!r}: {error.strerror}") from None
        if done.returncode or not found.exists():
            said = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
            raise GraderError(f"radgraph: {said[-1]}")
        return json.loads(found.read_text())


# --- CheXbert -------------------------------------------------------------------------------------------------


def _chexbert_f1(references, candidates, graders) -> Statistics:
    """F1 per class and their mean; "positive" counts as 1, blank, negative and uncertain as 0."""
    read = chexbert.Labeler(graders["chexbert"], graders["vocab"])
    truth, found = read(references) == chexbert.POSITIVE, read(candidates) == chexbert.POSITIVE
    per_report = np.concatenate([truth & found, ~truth & found, truth & ~found], axis=1).astype(float)
    return Statistics(per_report, _f1_per_class, {"signature": "CheXbert, uncertain as negative"})


def _f1_per_class(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Of sums [..., 3 x 14]: right, wrongly found, missed; a class that nobody has or finds scores 0."""
    right, wrong, missed = np.split(sums, 3, axis=-1)
    values = 2 * right / np.maximum(2 * right + wrong + missed, 1)
    return {"macro": values.mean(-1)} | {name: values[..., i] for i, name in enumerate(chexbert.CLASSES)}


METRICS = {"rouge_l": _rouge_l, "bleu_4": _bleu_4, "rg_er": _rg_er, "chexbert_f1": _chexbert_f1}
