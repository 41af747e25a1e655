"""Our own workdirs as a source of weights: the teacher, the network that it fits, how its films are prepared."""

from pathlib import Path

from raddino_jax import checkpoints
from raddino_jax import params as trees
from raddino_jax.conversion import huggingface, sources
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.conversion.rules import WeightsError
from raddino_jax.conversion.sources import Source
from raddino_jax.models.vit import VARIANTS


def open_workdir(workdir: Path, step: int | None = None) -> Source:
    """The teacher of a workdir's newest checkpoint, or of one step. Raises WeightsError, with what is wrong."""
    config = huggingface.read_json(workdir / "config.json")
    try:
        step = _newest(workdir, step)
        teacher = checkpoints.load_arrays(workdir, "teacher", step)
    except FileNotFoundError as error:
        raise WeightsError(str(error)) from None
    except Exception as error:  # whatever Orbax meets in damaged files
        raise WeightsError(
            f"{workdir}/checkpoints/{step} cannot be read ({type(error).__name__}: {error})"
        ) from None
    try:
        fields, settings = _stated(config)
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"{workdir}/config.json: expected the config of a training run ({error!r})"
        ) from None
    modules = {name: trees.flatten(tree) for name, tree in teacher.items()}
    notes = [f"{', '.join(modules)}: the teacher of {workdir} at step {step}"]
    found = sources.dinov2_fields(modules["backbone"], str(workdir), notes, fields["heads"])
    resizing = {k: fields.pop(k) for k in ("antialias", "offset")}
    sources.agree(found, fields, str(workdir))
    facts = {"step": step, "config": config}
    return Source(str(workdir), "workdir", modules, found | resizing, settings, facts, notes)


def _newest(workdir: Path, step: int | None) -> int:
    """The newest step, or the given one if it is there."""
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
    if not steps or step not in (None, *steps):
        raise FileNotFoundError(
            f"{workdir} has no complete checkpoint{'' if step is None else f' of step {step}'} "
            f"(steps: {', '.join(map(str, steps)) or 'none'})"
        )
    return steps[-1] if step is None else step


def _stated(config: dict) -> tuple[dict, Preprocess]:
    """What config.json says of the network and of its films: the centre of what training cuts its crops from."""
    model = config["model"]
    shape = dict(VARIANTS[model["variant"]])
    shape |= {k: model[k] for k in ("width", "depth", "heads", "ffn") if model[k]}
    fields = shape | {k: model[k] for k in ("patch_size", "image_size", "registers", "antialias", "offset")}
    if "preprocess" in config:  # written by `convert`
        stated = config["preprocess"]
        return fields, Preprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()})
    data, patch, standardize = config["data"], model["patch_size"], config["views"]["standardize"]
    size = data["image_size"]
    return fields, Preprocess(size, size // patch * patch, (data["mean"],), (data["std"],), standardize=standardize)
