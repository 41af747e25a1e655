"""task=predict: the masks of a folder of films, by a finished run of task=segment.

Written: masks/NAME.png of the film's size, overlays/NAME.png, rejects.csv, and structures.json with the value of each
structure in the masks, the one that it had in the masks that were learned from, else 1, 2, ... NAME is the film's path
in its folder, without suffix. Where structures overlap the later one is written over the earlier, unless
`config.separate` asks for a picture each (NAME-STRUCTURE.png, 255).
"""

import csv
import io
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from raddino_jax import checkpoints, logs
from raddino_jax.data import cases, images, pipeline
from raddino_jax.evals import frames, heads, overlays, segment


def run(config, workdir: Path) -> None:
    """Predict every film below `config.images` into `config.out`, by default predictions/ of the workdir.

    Raises DataError where the workdir holds no finished head or the folder no film.
    """
    workdir = Path(workdir)
    trained = ConfigDict(json.loads((workdir / "config.json").read_text()))
    if trained.get("task") != "segment":
        raise cases.CaseError(f"{workdir} is no run of task=segment, but of task={trained.get('task')!r}")
    if not config.images:
        raise cases.CaseError("images is empty: name a folder of films, --config.images=FOLDER")
    part = workdir / config.part
    variables, rules = load(part), json.loads((workdir / "structures.json").read_text())
    head = heads.build(trained, len(rules))
    logits = segment.compiled(head, variables)
    films = named(pipeline.Folder(config.images, image_size=0))
    out = Path(config.out or workdir / "predictions")
    out.mkdir(parents=True, exist_ok=True)
    logs.write_whole(out / "structures.json", json.dumps(rules, indent=1) + "\n")
    rejects = [("file", "reason")]
    for name, path in films.items():
        try:
            film = images.read(path)
        except images.ImageError as error:
            rejects.append((path.relative_to(config.images).as_posix(), str(error)))
            continue
        levels, frame = frames.framed(film, head.settings, trained.fit)
        predicted = frames.over_film(logits(levels[None])[0], frame, film.shape) > 0
        _write(out, name, film, predicted, rules, config.separate)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rejects)
    logs.write_whole(out / "rejects.csv", text.getvalue())
    failed = len(rejects) - 1
    logs.say(f"predict: {len(films) - failed} films in {out}, {failed} could not be read")


def named(films: pipeline.Folder) -> dict[str, Path]:
    """Films by what their masks are called. Raises CaseError where one mask would be written over another."""
    found: dict[str, Path] = {}
    for path in films.files:
        place = path.relative_to(films.root)
        name = cases.bare(place)
        if name in found:
            other = found[name].relative_to(films.root)
            raise cases.CaseError(f"{other} and {place} would both be written to masks/{name}.png: rename one of them")
        found[name] = path
    return found


def load(workdir: Path) -> dict:
    """The best variables of a finished run. Raises CaseError where there are none."""
    try:
        return checkpoints.load_arrays(workdir, "teacher")
    except FileNotFoundError as error:
        raise cases.CaseError(
            f"{error}: run task=segment there first; of a curve, config.part names one of its folders"
        ) from None


def _write(out: Path, name: str, film: np.ndarray, predicted: np.ndarray, rules: dict, separate: bool) -> None:
    overlays.save(out / "overlays" / f"{name}.png", film, predicted)
    (out / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
    if separate:
        for structure, mask in zip(rules, predicted, strict=True):
            path = out / "masks" / f"{name}-{structure.replace(' ', '_')}.png"
            Image.fromarray(255 * mask.astype(np.uint8)).save(path)
        return
    values = np.zeros(film.shape, np.uint8)
    for value, mask in zip(rules.values(), predicted, strict=True):
        values[mask] = value
    Image.fromarray(values).save(out / "masks" / f"{name}.png")
