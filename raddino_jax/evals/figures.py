"""The pictures of a run and report.html: what it learns, what it attends to, where its features agree.

Every picture is a PNG in `figures/` beside the numbers behind it (CSV), and all of them stand in one page that needs
no other file.
"""

import html
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from raddino_jax import encoders, logs
from raddino_jax.data import images, pipeline
from raddino_jax.evals import curves, decode, heads, maps, overlays
from raddino_jax.evals.picture import Picture

# What configs/figures.py sets; a run that ends with its figures takes these.
WANTED = ConfigDict(dict(
    encoder="", weights="", image_size=0, films=(), points=(), layer=-1, heads=(),
    runs=(), by="data.fraction", metric="", classes=("macro",), encoders=(),
))  # fmt: skip
FILMS = 6  # of a run's sources, where none are named


def run(config, workdir: Path) -> None:
    """Draw every picture that there are numbers for; write figures/ and report.html."""
    workdir, wanted = Path(workdir), config if config.task == "figures" else WANTED
    path = workdir / "config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    folder = workdir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for picture in _pictures(wanted, settings, workdir):
        picture.save(folder)
        pictures.append(picture)
    page = workdir / "report.html"
    logs.write_whole(page, _page(pictures, wanted, settings, workdir))
    logs.say(f"figures: {len(pictures)} in {folder}, all in {page}")


def _pictures(wanted, settings: dict, workdir: Path) -> Iterator[Picture]:
    yield from curves.training(logs.read_metrics(workdir), settings)
    yield from curves.results(workdir)
    for drawn in (overlays.gallery(workdir), decode.gallery(workdir)):
        if drawn is not None:
            yield drawn
    if wanted.runs:
        yield curves.over(wanted.runs, wanted.by, wanted.metric, wanted.classes, wanted.encoders)
    if wanted.encoder or settings.get("task") == "pretrain":
        yield from _looks(wanted, settings, workdir)


def _looks(wanted, settings: dict, workdir: Path) -> Iterator[Picture]:
    """What the encoder sees in films: those named, or some of the run's sources."""
    films = read_films(wanted.films) if wanted.films else sample(ConfigDict(settings), wanted.image_size)
    encoder = encoders.load(wanted.encoder or str(workdir), weights=wanted.weights)
    encoder = heads.sized(encoder, wanted.image_size)
    attention = maps.attention(encoder, films[:4], wanted.layer, wanted.heads)
    if attention is None:
        logs.say(f"figures: no attention maps, {encoder.name} is no vision transformer of models/vit.py")
    else:
        yield attention
    yield maps.similarity(encoder, films, wanted.points)
    yield maps.components(encoder, films)


def read_films(paths) -> list[np.ndarray]:
    """Films from files of any kind. Raises DataError that names the file."""
    films = []
    for path in paths:
        try:
            films.append(images.read(path))
        except (OSError, images.ImageError) as error:
            raise pipeline.DataError(f"films: {path}: {error}") from error
    return films


def sample(config: ConfigDict, size: int = 0, count: int = FILMS) -> list[np.ndarray]:
    """A few films of a run's sources, spread over the first of them; size: of their squares, 0 = as in training."""
    if "data" not in config:
        raise pipeline.DataError("films: name some, --config.films=\"('a.png','b.png')\"; the workdir has no run")
    config.data.image_size = size or config.data.image_size
    source = pipeline.open_sources(config.data)[0]
    square = pipeline.square(config.data)
    return [square(source.film(int(i))) for i in np.linspace(0, len(source) - 1, min(count, len(source)))]


# --- the page -------------------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em } img { max-width: 100%; height: auto }
.kind { background: #fff3d6; border-left: 4px solid #c2772b; padding: .5em 1em }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 13px }
"""


def _page(pictures: list[Picture], wanted, settings: dict, workdir: Path) -> str:
    name, kind = html.escape(workdir.name), html.escape(_kind(wanted, settings))
    shown = settings or wanted.to_dict()
    parts = [
        f"<h1>Run {name}</h1><p class=kind>{kind}</p>",
        *(picture.html() for picture in pictures),
        f"<h2>Config</h2><pre>{html.escape(json.dumps(shown, indent=1, sort_keys=True, default=list))}</pre>",
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
    return head + "<body>" + "\n".join(parts) + "</body></html>\n"


def _kind(wanted, settings: dict) -> str:
    """Whose films these are: made-up ones must not pass for a clinical result."""
    sources = ", ".join(settings.get("data", {}).get("sources", ())) or settings.get("dataset", "")
    if not sources:
        return f"Pictures of {wanted.encoder or 'several runs'}."
    synthetic = "SYNTHETIC radiographs: nothing here is a clinical result" if "synthetic" in sources else "real films"
    return f"Trained on {sources} ({synthetic})."
