"""The pictures of a run and report.html: what it learns, what it attends to, where its features agree.

Every picture is a PNG in `figures/` beside the numbers behind it, and all of them stand in one self-contained page.
"""

import base64
import csv
import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from ml_collections import ConfigDict

from raddino_jax import encoders, logs
from raddino_jax.data import pipeline
from raddino_jax.models import vit

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RIVALS = {"teacher": "#1f5a99", "init": "#c2772b", "pixels": "#7a7a7a"}  # the same colour in every picture


@dataclass
class Picture:
    """A figure with its title, a plain sentence on what it shows, and the numbers behind it."""

    name: str
    title: str
    sentence: str
    figure: plt.Figure
    numbers: list[dict]


def run(config, workdir: Path) -> None:
    """Draw every picture that the workdir has numbers for; write figures/ and report.html."""
    del config  # the run's own is beside its checkpoints
    workdir = Path(workdir)
    settings = json.loads((workdir / "config.json").read_text())
    pictures = curves(logs.read_metrics(workdir), settings) + results(workdir)
    films = sample(ConfigDict(settings))
    if films:
        encoder = encoders.load(str(workdir))
        pictures += [attention(encoder, films), similarity(encoder, films), components(encoder, films)]
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=90, bbox_inches="tight")
        plt.close(picture.figure)
        _write_numbers(folder / f"{picture.name}.csv", picture.numbers)
    page = workdir / "report.html"
    logs.write_whole(page, _page(pictures, folder, settings, workdir))
    logs.say(f"figures: {len(pictures)} in {folder}, all in {page}")


def sample(config: ConfigDict, count: int = 6) -> list[np.ndarray]:
    """A few films of the run's sources, spread over each."""
    source = pipeline.open_sources(config.data)[0]
    square = pipeline.square(config.data)
    return [square(source.film(int(i))) for i in np.linspace(0, len(source) - 1, min(count, len(source)))]


# --- curves ---------------------------------------------------------------------------------------------


def curves(rows: list[dict], settings: dict) -> list[Picture]:
    """Loss, diagnostics and online scores over the steps of metrics.jsonl."""
    if not rows:
        return []
    k = settings["head"]["prototypes"]
    uniform = float(np.log(k))
    found = [
        _lines("loss", "Loss", rows, [("loss", "dino_global", "dino_local", "ibot", "koleo")],
               "The total is the sum of the four terms. The DINO and iBOT terms should fall from the value of uniform "
               "targets; the total alone says little, because the targets sharpen meanwhile."),
        _lines("diagnostics", "Is it learning?", rows,
               [("target_entropy",), ("prototypes_used", "agreement"), ("cls_rank", "patch_rank"),
                ("cls_cosine", "patch_cosine")],
               f"Collapse would show as target entropy at {uniform:.2f} (uniform over {k} prototypes) or at 0, as few "
               "prototypes in use, as a rank near 1 or as a mean cosine of 1 between different films."
               + _verdict(rows)),
    ]
    scored = [row for row in rows if "probe_auprc" in row]
    if scored:
        found.append(_lines("probe", "What the features know, over time", scored,
                            [("probe_auprc", "probe_knn_auprc"), ("probe_auroc",), ("probe_knn_accuracy",)],
                            "A linear probe and a kNN vote on the teacher's features, on a split by patient."))
    return found


def _verdict(rows: list[dict]) -> str:
    collapsed = [row for row in rows if row.get("collapse")]
    if not collapsed:
        return " No log line of this run showed a sign of it."
    return f" From step {collapsed[0]['step']} on this run shows it. {collapsed[-1]['collapse']}."


def _lines(name, title, rows, panels, sentence) -> Picture:
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels) + 1.2, 3), squeeze=False)
    steps = [row["step"] for row in rows]
    for axis, fields in zip(axes[0], panels, strict=True):
        for field in fields:
            axis.plot(steps, [row.get(field, np.nan) for row in rows], label=field.removeprefix("probe_"), lw=1.4)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    fields = ["step", *(field for panel in panels for field in panel)]
    return Picture(name, title, sentence, figure, [{f: row.get(f) for f in fields} for row in rows])


def results(workdir: Path) -> list[Picture]:
    """Average precision per class of results.json, with intervals."""
    path = workdir / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in rows if row["metric"] == "auprc"]
    if not rows:
        return []
    classes = list(dict.fromkeys(row["class"] for row in rows))
    figure, axis = plt.subplots(figsize=(1.3 * len(classes) + 2, 3.2))
    names = [name for name in RIVALS if any(row["encoder"] == name for row in rows)]
    for offset, name in enumerate(names):
        mine = {row["class"]: row for row in rows if row["encoder"] == name}
        value = [mine[c]["value"] for c in classes]
        half = [mine[c]["value"] - mine[c]["interval"][0] for c in classes]
        at = np.arange(len(classes)) + (offset - (len(names) - 1) / 2) * 0.26
        axis.bar(at, value, 0.24, yerr=half, capsize=2, color=RIVALS[name], label=name)
    axis.set_xticks(range(len(classes)), classes, rotation=20)
    axis.set_ylabel("average precision")
    axis.legend(frameon=False)
    return [Picture("results", f"Teacher, initialisation and pixels ({rows[0]['data']} films)", _comparison(rows),
                    figure, [{k: row[k] for k in ("encoder", "class", "value", "std", "n")} for row in rows])]


def _comparison(rows: list[dict]) -> str:
    """Who wins where, in words, the pixels included."""
    by = {(row["encoder"], row["class"]): row for row in rows}
    teacher = by["teacher", "macro"]
    said = [f"The teacher's macro average precision is {teacher['value']:.3f}"]
    for rival in ("init", "pixels"):
        row = by.get((rival, "macro"))
        if row:
            said.append(f"{_versus(teacher, row)} {rival} at {row['value']:.3f}")
    pixels = {c: row["value"] for (e, c), row in by.items() if e == "pixels" and c != "macro"}
    lost = [c for c, value in pixels.items() if value > by["teacher", c]["value"]]
    still = f"Plain pixels still win on {', '.join(lost)}." if lost else "Plain pixels win on no class."
    how = f"{teacher['n']} films, {len(teacher['seed'])} splits by patient, the same probe for all."
    return f"{'; '.join(said)}. {still} {how} Bars are 95 % intervals."


def _versus(ours: dict, theirs: dict) -> str:
    if ours["interval"][0] > theirs["interval"][1]:
        return "above"
    return "below" if ours["interval"][1] < theirs["interval"][0] else "not told apart from"


# --- what the network looks at -----------------------------------------------------------------------------


def attention(encoder, films: list[np.ndarray]) -> Picture:
    """Attention of the class token in the last block, per head, over a few films."""
    films = films[:4]
    maps = np.asarray(vit.attention_maps(encoder.network, encoder.params, encoder.preprocess(films)))
    maps = maps[:, :, 0, 1 + encoder.network.registers :]
    side = round(maps.shape[-1] ** 0.5)
    heads = maps.shape[1]
    figure, axes = _grid(len(films), heads + 2)
    for row, film in zip(range(len(films)), films, strict=True):
        panels = [film, maps[row].mean(0).reshape(side, side), *maps[row].reshape(heads, side, side)]
        for column, panel in enumerate(panels):
            axes[row, column].imshow(panel, cmap="gray" if column == 0 else "magma", interpolation="nearest")
    for column, title in enumerate(["film", "mean", *(f"head {h}" for h in range(heads))]):
        axes[0, column].set_title(title, fontsize=9)
    numbers = [dict(film=i, head=h, entropy=_entropy(maps[i, h])) for i in range(len(films)) for h in range(heads)]
    return Picture("attention", "What the class token attends to",
                   "Bright patches weigh most in the summary of the film. Heads that show the same even grey have "
                   "not specialised; heads that light up on heart, diaphragm or lung borders have.", figure, numbers)


def _entropy(p: np.ndarray) -> float:
    p = p / p.sum()
    return float(-(p * np.log(np.maximum(p, 1e-30))).sum())


def similarity(encoder, films: list[np.ndarray], points=((0.45, 0.3), (0.65, 0.62), (0.3, 0.5))) -> Picture:
    """Cosine of every patch of several films with one patch of the first film, at points (row, column) in [0, 1]."""
    patches = _unit_patches(encoder, films)
    side = patches.shape[1]
    figure, axes = _grid(len(points), len(films) + 1)
    numbers = []
    for row, (y, x) in enumerate(points):
        at = int(y * side), int(x * side)
        heat = patches @ patches[0][at]
        pixels = films[0].shape[0] / side
        axes[row, 0].imshow(films[0], cmap="gray")
        axes[row, 0].plot((at[1] + 0.5) * pixels, (at[0] + 0.5) * pixels, "r+", ms=12, mew=2)
        for column, (film, values) in enumerate(zip(films, heat, strict=True), start=1):
            _overlay(axes[row, column], film, values)
            summary = dict(best=float(values.max()), mean=float(values.mean()))
            numbers.append(dict(row=at[0], column=at[1], film=column - 1) | summary)
    axes[0, 0].set_title("point", fontsize=9)
    return Picture("similarity", "Where other films look like this point",
                   "The red cross marks a patch of the first film; warm colours mark patches with similar features "
                   "there and in the other films. Good features find the same anatomy.", figure, numbers)


def components(encoder, films: list[np.ndarray]) -> Picture:
    """First three principal components of patch features as red, green and blue."""
    patches = _unit_patches(encoder, films)
    flat = patches.reshape(-1, patches.shape[-1])
    flat = flat - flat.mean(0)
    _, sizes, axes_ = np.linalg.svd(flat, full_matrices=False)
    scores = (flat @ axes_[:3].T).reshape(*patches.shape[:3], 3)
    low, high = np.percentile(scores, [2, 98], axis=(0, 1, 2))
    colours = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    figure, axes = _grid(2, len(films))
    for column, (film, colour) in enumerate(zip(films, colours, strict=True)):
        axes[0, column].imshow(film, cmap="gray")
        axes[1, column].imshow(colour, interpolation="nearest")
    share = sizes**2 / (sizes**2).sum()
    return Picture("components", "Principal components of the patch features",
                   f"Patches of the same colour have similar features; the three colours hold {share[:3].sum():.0%} "
                   "of the variance. Lungs, mediastinum and background should part.", figure,
                   [dict(component=i, share=float(s)) for i, s in enumerate(share[:10])])


def _unit_patches(encoder, films) -> np.ndarray:
    patches = np.asarray(encoder(encoder.preprocess(films))["patches"], np.float32)
    return patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)


def _overlay(axis, film, values) -> None:
    height, width = film.shape
    axis.imshow(film, cmap="gray")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(values, cmap="inferno", alpha=0.55, extent=extent, interpolation="bilinear")


def _grid(rows: int, columns: int) -> tuple[plt.Figure, np.ndarray]:
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.75 * rows), squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    return figure, axes


# --- the page ---------------------------------------------------------------------------------------------


def _write_numbers(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em } img { max-width: 100%; height: auto }
.kind { background: #fff3d6; border-left: 4px solid #c2772b; padding: .5em 1em }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 13px }
"""


def _page(pictures: list[Picture], folder: Path, settings: dict, workdir: Path) -> str:
    escape: Callable[[str], str] = html.escape
    sources = ", ".join(settings["data"]["sources"])
    kind = "SYNTHETIC radiographs: nothing here is a clinical result" if "synthetic" in sources else "real films"
    parts = [
        f"<h1>Run {escape(workdir.name)}</h1><p class=kind>Trained on {escape(sources)} ({kind}).</p>",
        *(f"<h2>{escape(p.title)}</h2><p>{escape(p.sentence)}</p><img alt='{escape(p.title)}' "
          f"src='data:image/png;base64,{_encoded(folder / (p.name + '.png'))}'>" for p in pictures),
        f"<h2>Config</h2><pre>{escape(json.dumps(settings, indent=1, sort_keys=True))}</pre>",
    ]
    title = f"<title>{escape(workdir.name)}</title>"
    head = f"<!doctype html><html lang=en><meta charset=utf-8>{title}<style>{STYLE}</style>"
    return head + "<body>" + "\n".join(parts) + "</body></html>\n"


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
