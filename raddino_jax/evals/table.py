"""task=table: results.json of many workdirs beside what the paper reports, cell by cell.

A cell that no run fills stays empty and says why. A number that was not measured on real films says so in its own cell,
wherever it stands.
"""

import csv
import glob
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from raddino_jax import logs
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import paper
from raddino_jax.evals.picture import COLOURS, Picture, panels

NEEDED = {"task", "encoder", "metric", "value", "class", "data"}
RUN_TEACHER = "teacher"  # what a pre-training run calls its own encoder


@dataclass(frozen=True)
class Result:
    """One row of a results.json, the workdir it lies in, what made it, and when."""

    row: Mapping
    workdir: Path
    command: str
    written: float

    def has(self, wanted: Mapping) -> bool:
        """Whether the row has these fields; a field that it lacks counts as ""."""
        return all(self.row.get(name, "") == value for name, value in wanted.items())


@dataclass(frozen=True)
class Line:
    """A cell of the paper and what stands beside it. reason: why ours, or the paper's, is empty."""

    row: str
    column: str
    paper: str = ""
    ours: str = ""
    n: str = ""
    command: str = ""
    reason: str = ""


def run(config, workdir: Path) -> None:
    """Write table_NAME.md and .csv, of a figure also .png. Raises DataError."""
    name, workdir = config.table, Path(workdir)
    known = {**paper.TABLES, **paper.FIGURES}
    if name not in known:
        raise DataError(f"table={name!r} must be one of {', '.join(known)}")
    results = [
        result if (label := _label(result, config.called)) == result.row["encoder"]
        else Result({**result.row, "encoder": label}, result.workdir, result.command, result.written)
        for result in read_runs(config.runs)
    ]
    if not results:
        logs.say(f"table: runs={config.runs} matches no folder with a results.json")
    workdir.mkdir(parents=True, exist_ok=True)
    if name in paper.TABLES:
        text, lines = of_table(paper.TABLES[name], results, config.dataset)
    else:
        text, lines, picture = of_figure(paper.FIGURES[name], results, config.dataset)
        if picture is not None:
            (workdir / f"table_{name}.png").write_bytes(picture.png())
            text += f"\n![{picture.title}](table_{name}.png)\n\n{picture.sentence}\n"
    logs.write_whole(workdir / f"table_{name}.md", text)
    logs.write_whole(workdir / f"table_{name}.csv", _csv(lines))
    filled = sum(bool(line.ours) for line in lines)
    logs.say(f"table: {filled} of {len(lines)} cells of {known[name].title} filled, in {workdir / f'table_{name}.md'}")


# --- what runs have -------------------------------------------------------------------------------------------


def read_runs(pattern: str) -> list[Result]:
    """All rows of the workdirs that match. Raises DataError for a file that is no results.json."""
    found = []
    for path in sorted(Path(p) for p in glob.glob(f"{pattern}/results.json")):
        try:
            rows = [dict(row) for row in json.loads(path.read_text())]
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}): run that task again") from error
        for row in rows:
            if lacking := NEEDED - set(row):
                raise DataError(f"{path} has a row without {', '.join(sorted(lacking))}")
        found += [Result(row, path.parent, _command(path.parent), path.stat().st_mtime) for row in rows]
    return found


def _command(workdir: Path) -> str:
    """The command of the newest start of a workdir, "" where none is recorded."""
    path = workdir / "starts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["command"] if lines else ""


def _label(result: Result, called: Sequence[str]) -> str:
    """What the table calls a result's encoder. Raises DataError for a pair without "="."""
    for pair in called:
        run, equals, name = pair.rpartition("=")
        if not equals or not run or not name:
            raise DataError(f"called: expected 'ENCODER OR WORKDIR=ROW', found {pair!r}")
        own = Path(run) == result.workdir and result.row["encoder"] == RUN_TEACHER
        if own or result.row["encoder"] == run:
            return name
    return result.row["encoder"]


def _best(results: Sequence[Result]) -> Result:
    """Of several rows for one cell: most training films, means over seeds before single seeds, then the newest."""
    return max(results, key=lambda r: (r.row.get("films", 0), isinstance(r.row.get("seed"), list), r.written))


def value_of(row: Mapping, decimals: int) -> str:
    """"52.8 (0.4)": the value x 100 with its deviation, and what films it was measured on unless they are real."""
    spread = "" if row.get("std") is None or np.isnan(row["std"]) else f" ({100 * row['std']:.{decimals}f})"
    return f"{100 * row['value']:.{decimals}f}{spread}" + ("" if row["data"] == "real" else f" {row['data']}")


def _line(row: str, column: str, printed: str, result: Result, decimals: int) -> Line:
    if result.row["value"] is None:
        return Line(row, column, printed, command=result.command, reason=result.row.get("reason", "no value"))
    reason = "" if printed else "not in the paper"
    shown, n = value_of(result.row, decimals), str(result.row.get("n", ""))
    return Line(row, column, printed, shown, n, result.command or f"of {result.workdir}", reason)


# --- tables ---------------------------------------------------------------------------------------------------


def of_table(table: paper.Table, results: Sequence[Result], dataset: str = "") -> tuple[str, list[Line]]:
    """(Markdown, lines) of a table; results of other data follow in a part of their own."""
    used, lines = set(), []
    for line, result in _cells(table, results, dataset):
        lines.append(line)
        used.add(id(result))
    asked = [_wanted(table, column, dataset) for column in table.columns]
    kinds = {(wanted["task"], wanted["metric"]) for wanted in asked}
    rest = [
        r for r in results
        if id(r) not in used and (r.row["task"], r.row["metric"]) in kinds and not r.row.get("stratum")
        and r.row.get("dataset") not in {wanted.get("dataset") for wanted in asked} and r.row["value"] is not None
    ]
    text = _markdown(table.title, "Values x 100; in brackets the standard deviation.", lines)
    return text + _elsewhere(rest, table.decimals), lines


def _wanted(table: paper.Table, column: str, dataset: str) -> dict:
    wanted = {**table.common, **table.columns[column]}
    return wanted | ({"dataset": dataset} if dataset else {})


def _cells(table: paper.Table, results, dataset: str) -> Iterator[tuple[Line, Result | None]]:
    """Every cell of the paper, then those of encoders that it has not."""
    known = [wanted["encoder"] for wanted in table.rows.values()]
    for row, who in table.rows.items():
        for column, number in zip(table.columns, table.numbers[row], strict=True):
            printed = f"{number:.{table.decimals}f}"
            fitting = [r for r in results if r.has(_wanted(table, column, dataset) | who)]
            if fitting:
                best = _best(fitting)
                yield _line(row, column, printed, best, table.decimals), best
            else:
                yield _empty(table, row, column, printed), None
    for encoder in dict.fromkeys(r.row["encoder"] for r in results if r.row["encoder"] not in known):
        for column in table.columns:
            fitting = [r for r in results if r.has(_wanted(table, column, dataset) | {"encoder": encoder})]
            for head in dict.fromkeys(r.row.get("head", "") for r in fitting):
                best = _best([r for r in fitting if r.row.get("head", "") == head])
                yield _line(f"{encoder}, {head}" if head else encoder, column, "", best, table.decimals), best


def _empty(table: paper.Table, row: str, column: str, printed: str) -> Line:
    who, what = table.rows[row], _wanted(table, column, "")
    name, own = who["encoder"].replace(" ", "_"), ""
    way = what["dataset"] if what["dataset"] in paper.COMMANDS else what["task"]
    command = paper.COMMANDS[way].format(
        encoder=name, head=who.get("head", what.get("head", "")), dataset=what["dataset"]
    ) + table.more
    if who["encoder"] not in (*paper.ENCODERS.values(), "none"):
        command = command.replace(f"encoder={name}", f"encoder=runs/{name}")
        own = "; the encoder is a run of yours (called)"
    return Line(row, column, printed, command=command, reason=f"no run of it; needs {table.needs}{own}")


def _elsewhere(results: Sequence[Result], decimals: int) -> str:
    """The same scores on other data, best row per place."""
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        place = tuple(str(r.row.get(name, "")) for name in ("dataset", "encoder", "head", "metric", "class"))
        groups.setdefault(place, []).append(r)
    lines = [
        _line(" / ".join(filter(None, place[:3])), f"{place[4]} {place[3]}", "", _best(found), decimals)
        for place, found in groups.items()
    ]
    if not lines:
        return ""
    return "\n" + _markdown("The same scores on other data", "Not to be compared with the paper.", lines, "##", False)


# --- figures --------------------------------------------------------------------------------------------------


def of_figure(figure: paper.Figure, results: Sequence[Result], dataset: str = ""):
    """(Markdown, lines, Picture or None where there is nothing to draw)."""
    common = dict(figure.common) | ({"dataset": dataset} if dataset else {})
    found: dict[tuple, list[Result]] = {}
    places = {_plain(value): name for name, value in figure.places.items()}
    for result in results:
        value = _field(_pretraining(result), figure.by)
        if value is not None and result.has(common) and result.row["value"] is not None:
            name = places.setdefault(_plain(value), _plain(value))
            found.setdefault((name, result.row["class"]), []).append(result)
    classes = [c for c in figure.classes if not dataset or any(c == k for _, k in found)] or ["macro"]
    presets = dict(zip(figure.places, figure.presets, strict=False))
    lines = []
    for name in places.values():
        for column in classes:
            if (name, column) in found:
                line = _line(name, column, "", _best(found[name, column]), 1)
                lines.append(replace(line, reason="") if name in figure.places else line)
            elif name in figure.places:
                command = figure.command.format(value=figure.places[name], preset=presets.get(name, ""))
                lines.append(Line(name, column, command=command, reason=f"no run of it; needs {figure.needs}"))
    text = _markdown(figure.title, "Values x 100. The paper draws this curve; its numbers are not known here.", lines)
    drawn = {place: _best(here).row for place, here in found.items() if place[1] in classes}
    return text, lines, _draw(figure, list(places.values()), classes, drawn) if drawn else None


def _pretraining(result: Result) -> dict:
    """Config of the run that made the encoder: the workdir's own, or that of the workdir which the row names."""
    encoder = result.row["encoder"]
    for folder in (result.workdir,) if encoder == RUN_TEACHER else (Path(encoder), result.workdir.parent / encoder):
        if (folder / "config.json").exists():
            config = json.loads((folder / "config.json").read_text())
            return config if config.get("task") == "pretrain" else {}
    return {}


def _field(config: Mapping, name: str):
    for key in name.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _plain(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _draw(figure: paper.Figure, places: Sequence[str], classes: Sequence[str], rows: Mapping) -> Picture:
    drawn, axes = panels(1, 1, 6.4, 3.8)
    axis, numbers = axes[0, 0], []
    for column, colour in zip(classes, np.resize(COLOURS, len(classes)), strict=True):
        at = [place for place in places if (place, column) in rows]
        here = [rows[place, column] for place in at]
        # A lone seed has no deviation; its point then has no whisker.
        reach = [100 * (row.get("std") or 0) for row in here]
        where = [places.index(place) for place in at]
        heights = [100 * row["value"] for row in here]
        axis.errorbar(where, heights, reach, marker="o", capsize=3, color=colour, label=f"average precision, {column}")
        numbers += [{"place": place, "class": column} | dict(row) for place, row in zip(at, here, strict=True)]
    axis.set_xticks(range(len(places)), places)
    axis.set_xlim(-0.4, len(places) - 0.6)
    axis.set_xlabel(figure.by.split(".")[-1].replace("_", " "))
    axis.set_ylabel("x 100")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    kinds = sorted({row["data"] for row in rows.values()})
    kind = "real films" if kinds == ["real"] else f"{' and '.join(kinds).upper()} films"
    axis.set_title(f"ours, {kind}", fontsize=10)
    said = f"Ours on {kind}; whiskers are standard deviations. The numbers of the paper's curve are not known here."
    return Picture("figure", figure.title, said, drawn, numbers)


# --- writing --------------------------------------------------------------------------------------------------


def _markdown(title: str, sentence: str, lines: Sequence[Line], level: str = "#", papers: bool = True) -> str:
    """A table whose commands are numbered and listed below it."""
    different = dict.fromkeys(x.command for x in lines if x.command)
    commands = {command: number for number, command in enumerate(different, start=1)}
    heads = ["row", "class", *(["paper"] if papers else []), "ours", "n", "command", *(["reason"] if papers else [])]
    rows = [heads, ["---"] * len(heads)]
    for x in lines:
        number = f"[{commands[x.command]}]" if x.command else ""
        cells = [x.row, x.column, *([x.paper] if papers else []), x.ours, x.n, number, *([x.reason] if papers else [])]
        rows.append([cell.replace("|", "\\|") for cell in cells])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    listed = "\n".join(f"[{number}] `{command}`  " for command, number in commands.items())
    return f"{level} {title}\n\n{sentence}\n\n{table}\n\n{listed}\n"


def _csv(lines: Sequence[Line]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("row", "class", "paper", "ours", "n", "command", "reason"))
    writer.writerows((x.row, x.column, x.paper, x.ours, x.n, x.command, x.reason) for x in lines)
    return out.getvalue()
