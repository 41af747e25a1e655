"""Curves and bars: a run over its steps, its results, and the results of several runs over what they differ in."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from raddino_jax import logs
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals.picture import COLOURS, Picture, panels

RIVALS = {"teacher": COLOURS[0], "init": COLOURS[1], "pixels": COLOURS[5]}  # the same colour in every picture
# Of several metrics in results.json the first here is drawn; names as a person writes them.
METRICS = {
    "auprc": "average precision", "dice": "Dice", "accuracy": "accuracy", "findings_f1": "F1 of findings",
    "rouge_l": "ROUGE-L", "auroc": "AUROC",
}  # fmt: skip


# --- one run over its steps -----------------------------------------------------------------------------------


def training(rows: list[dict], settings: dict) -> list[Picture]:
    """Loss, diagnostics and online scores over the steps of metrics.jsonl; settings: the run's config."""
    if not rows:
        return []
    if settings.get("task") != "pretrain":
        return _any_training(rows)
    k = settings["head"]["prototypes"]
    terms = ("loss", "dino_global", "dino_local", "ibot", "koleo")
    terms = tuple(term for term in terms if any(row.get(term) for row in rows))  # without those that are switched off
    found = [
        _lines("loss", "Loss", rows, [terms],
               "The total is the sum of the others. The DINO and iBOT terms should fall from the value of uniform "
               "targets; the total alone says little, because the targets sharpen meanwhile."),
        _lines("diagnostics", "Is it learning?", rows,
               [("target_entropy",), ("prototypes_used", "agreement"), ("cls_rank", "patch_rank"),
                ("cls_cosine", "patch_cosine")],
               f"Collapse would show as target entropy at {np.log(k):.2f} (uniform over {k} prototypes) or at 0, as "
               "few prototypes in use, as a rank near 1 or as a mean cosine of 1 between different films."
               + _verdict(rows)),
    ]
    scored = [row for row in rows if "probe_auprc" in row]
    if scored:
        found.append(_lines("probe", "What the features know, over time", scored,
                            [("probe_auprc", "probe_knn_auprc"), ("probe_auroc",), ("probe_knn_accuracy",)],
                            "A linear probe and a kNN vote on the teacher's features, on a split by patient."))
    return found


def _any_training(rows: list[dict]) -> list[Picture]:
    """What a downstream task logs: all its numbers but rates and the learning rate, losses together."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, int | float)))
    names = [name for name in names if name not in ("step", "lr", *logs.TIMINGS)]
    losses = tuple(name for name in names if "loss" in name)
    others = [(name,) for name in names if name not in losses]
    groups = ([losses] if losses else []) + others[:4]
    return [_lines("training", "Training", rows, groups, "What the run logged, over its steps.")] if groups else []


def _verdict(rows: list[dict]) -> str:
    collapsed = [row for row in rows if row.get("collapse")]
    if not collapsed:
        return " No log line of this run showed a sign of it."
    return f" From step {collapsed[0]['step']} on this run shows it. {collapsed[-1]['collapse']}."


def _lines(name, title, rows, groups, sentence) -> Picture:
    figure, axes = panels(1, len(groups), 4.2 if len(groups) > 1 else 6.4, 3)
    for axis, fields in zip(axes[0], groups, strict=True):
        for field, colour in zip(fields, COLOURS, strict=False):
            given = [(row["step"], row[field]) for row in rows if isinstance(row.get(field), int | float)]
            marker = "o" if len(given) < 12 else ""  # a single point has no line
            label = field.removeprefix("probe_")
            axis.plot(*zip(*given, strict=True), label=label, lw=1.4, color=colour, marker=marker)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(fields) > 3 else {}  # many would hide a curve
        axis.legend(edgecolor="none", framealpha=0.85, fontsize=8, **beside)
    figure.tight_layout()
    fields = ["step", *(field for group in groups for field in group)]
    return Picture(name, title, sentence, figure, [{f: row.get(f) for f in fields} for row in rows])


# --- one run's results ----------------------------------------------------------------------------------------


def results(workdir: Path) -> list[Picture]:
    """The scores of results.json per class and encoder, with their intervals."""
    rows = read_results(Path(workdir))
    metric = next((m for m in METRICS if any(row["metric"] == m for row in rows)), None)
    rows = [row for row in rows if row["metric"] == metric and not row.get("stratum")]
    if not rows:
        return []
    # Only one setting of each encoder: the first in the file, which is the task's main one.
    by = {}
    for row in rows:
        by.setdefault((_name(row), row["class"]), row)
    encoders = list(dict.fromkeys(encoder for encoder, _ in by))
    classes = list(dict.fromkeys(name for _, name in by))
    figure, axes = panels(1, 1, 1.3 * len(classes) + 2, 3.2)
    axis, width = axes[0, 0], 0.8 / len(encoders)
    for offset, encoder in enumerate(encoders):
        mine = [(i, by[encoder, name]) for i, name in enumerate(classes) if (encoder, name) in by]
        at = np.array([i for i, _ in mine]) + (offset - (len(encoders) - 1) / 2) * width
        bars = [row["value"] for _, row in mine]
        colour = RIVALS.get(encoder, COLOURS[offset % len(COLOURS)])
        axis.bar(at, bars, width * 0.92, yerr=np.array([_whisker(row) for _, row in mine]).T, capsize=2, color=colour,
                 label=encoder)
    axis.set_xticks(range(len(classes)), classes, rotation=20)
    axis.set_ylabel(METRICS[metric])
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, never over one
    sentence = _comparison(by) if ("teacher", "macro") in by else "Bars: means; whiskers: 95 % intervals."
    columns = ("encoder", "head", "class", "metric", "value", "std", "n")
    title = f"{METRICS[metric][0].upper() + METRICS[metric][1:]} per class ({rows[0]['data']} films)"
    return [Picture("results", title, sentence, figure,
                    [{k: row[k] for k in columns if k in row} for row in by.values()])]


def read_results(workdir: Path) -> list[dict]:
    """The rows of a workdir's results.json that have a value, [] where it has none."""
    path = workdir / "results.json"
    return [row for row in json.loads(path.read_text()) if row["value"] is not None] if path.exists() else []


def _name(row: dict) -> str:
    """An encoder, and the head on it where there are several kinds."""
    head, encoder = row.get("head", "none"), row["encoder"]
    encoder = encoder if encoder.count("/") < 2 else encoder.rstrip("/").rpartition("/")[2]  # of a long path the end
    return encoder if head == "none" else f"{head} on {encoder}" if encoder != "none" else head


def _whisker(row: dict) -> tuple[float, float]:
    """How far the 95 % interval reaches below and above the value; nothing where it is not known."""
    low, high = row.get("interval") or (np.nan, np.nan)
    reach = np.array([row["value"] - low, high - row["value"]], float)
    return tuple(np.where(np.isfinite(reach), np.maximum(reach, 0), 0))


def _comparison(by: dict) -> str:
    """Who wins where, in words, the pixels included."""
    teacher = by["teacher", "macro"]
    said = [f"The teacher's macro average precision is {teacher['value']:.3f}"]
    for rival in ("init", "pixels"):
        row = by.get((rival, "macro"))
        if row:
            said.append(f"{_versus(teacher, row)} {rival} at {row['value']:.3f}")
    pixels = {c: row["value"] for (e, c), row in by.items() if e == "pixels" and c != "macro"}
    lost = [c for c, value in pixels.items() if value > by["teacher", c]["value"]]
    still = f"Plain pixels still win on {', '.join(lost)}." if lost else "Plain pixels win on no class."
    how = f"{teacher['n']} films, {np.size(teacher['seed'])} splits by patient, the same probe for all."
    return f"{'; '.join(said)}. {still} {how} Bars are 95 % intervals."


def _versus(ours: dict, theirs: dict) -> str:
    if ours["interval"][0] > theirs["interval"][1]:
        return "above"
    return "below" if ours["interval"][1] < theirs["interval"][0] else "not told apart from"


# --- several runs over what they differ in --------------------------------------------------------------------


def over(
    runs: Sequence[str], by: str, metric: str = "", classes: Sequence[str] = ("macro",), encoders: Sequence[str] = ()
) -> Picture:
    """A score of several workdirs over a field of their rows or configs: sizes of data, resolutions, few-shot curves.

    runs: workdirs, or patterns of them ("runs/size_*"). by: a field of the rows ("films"), or of config.json
    ("data.fraction", "views.global_size"). metric: "" = the first known one. encoders: of the rows, () = all.
    Values at one place (seeds, runs) are averaged, and the whiskers are their standard deviation; a single one has its
    own interval. Raises DataError where there is nothing to draw.
    """
    points = list(_points(runs, by))
    metric = metric or next((m for m in METRICS if any(row["metric"] == m for _, row, _ in points)), "")
    chosen = [
        (x, row, run) for x, row, run in points
        if row["metric"] == metric and row["class"] in classes and not row.get("stratum")
        and (not encoders or row["encoder"] in encoders)
    ]
    if not chosen:
        found = sorted({f"{row['metric']} of {row['class']}" for _, row, _ in points})
        raise DataError(
            f"nothing to draw over by={by!r}: expected rows {metric or 'of a known metric'} of {', '.join(classes)} in "
            f"results.json of {', '.join(runs)}, found {', '.join(found) or 'none'}"
        )
    return _curve(chosen, by, metric)


def _points(runs: Sequence[str], by: str) -> Iterator[tuple[float | str, dict, str]]:
    """(x, row, workdir) of every row that the field is known for."""
    for pattern in runs:
        workdirs = sorted(Path(path).parent for path in glob.glob(f"{pattern}/results.json"))
        if not workdirs:
            raise DataError(f"runs: {pattern} is no workdir with a results.json")
        for workdir in workdirs:
            config = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").exists() else {}
            for row in read_results(workdir):
                x = row.get(by, _field(config, by))
                if isinstance(x, int | float | str):
                    yield x, row, workdir.name


def _field(config: dict, name: str):
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _curve(chosen: list[tuple], by: str, metric: str) -> Picture:
    numeric = all(isinstance(x, int | float) for x, *_ in chosen)
    places = sorted({x for x, *_ in chosen}) if numeric else list(dict.fromkeys(str(x) for x, *_ in chosen))
    figure, axes = panels(1, 1, 6.4, 3.8)
    axis, numbers = axes[0, 0], []
    lines = list(dict.fromkeys((_name(row), row["class"]) for _, row, _ in chosen))
    for (encoder, name), colour in zip(lines, np.resize(COLOURS, len(lines)), strict=True):
        mine = [
            (x if numeric else str(x), row, run) for x, row, run in chosen
            if (_name(row), row["class"]) == (encoder, name)
        ]
        at, means, reach = [], [], []
        for place in places:
            here = [row for x, row, _ in mine if x == place]
            # Single seeds where the file has them, rather than what it says of all seeds together.
            here = [row for row in here if not isinstance(row["seed"], list)] or here
            if here:
                at.append(place)
                means.append(np.mean([row["value"] for row in here]))
                spread = np.std([row["value"] for row in here], ddof=1) if len(here) > 1 else 0
                reach.append((spread, spread) if len(here) > 1 else _whisker(here[0]))
        axis.errorbar(at, means, yerr=np.array(reach).T, marker="o", ms=5, capsize=3, lw=1.6, color=colour,
                      label=encoder if name == "macro" else f"{encoder}, {name}")
        numbers += [{by: x, "encoder": encoder, "class": name, "metric": metric, "value": row["value"],
                     "std": row.get("std"), "n": row["n"], "run": run} for x, row, run in mine]
    if numeric and min(places) > 0 and max(places) >= 20 * min(places):
        axis.set_xscale("log")
    if numeric:
        axis.set_xticks(places, [f"{x:g}" for x in places])
        axis.minorticks_off()
    axis.set_xlabel(by.split(".")[-1].replace("_", " "))
    axis.set_ylabel(METRICS.get(metric, metric))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    kind = "SYNTHETIC films" if any(row["data"] == "synthetic" for _, row, _ in chosen) else "real films"
    return Picture(
        f"over_{by.replace('.', '_')}", f"{METRICS.get(metric, metric)} over {by} ({kind})",
        f"Each point is the mean of the runs or seeds at that place, {len(chosen)} results in all; whiskers are their "
        "standard deviation, or the 95 % interval where there is only one.",
        figure, numbers,
    )
