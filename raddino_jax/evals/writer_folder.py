"""The folder of a tuned writer: its language model as Hugging Face has it, tokenizer, and projector as LLaVA saves it.

config.json, model-*.safetensors, tokenizer.model or .json    what transformers opens
projector.safetensors                                         model.mm_projector.{0,2}.{weight,bias}
report.json                                                   which patches the projector reads
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from raddino_jax import params as trees
from raddino_jax.conversion import files, llama, rules, tables
from raddino_jax.conversion.rules import WeightsError

PROJECTOR, MADE = "projector.safetensors", "report.json"


def is_tuned(folder: str | Path) -> bool:
    """Whether a folder has a projector beside its language model."""
    return bool(folder) and (Path(folder) / PROJECTOR).exists()


def write(folder: Path, params: Mapping, sizes: Mapping, tokenizer: Path, made: Mapping) -> None:
    """Write the folder, whole or not at all.

    params: {"llama", "projector"} of numpy arrays, without adapters. made: what the patches were: encoder, layer, size.
    Raises WeightsError where there is something already.
    """
    files.check_new(folder)
    with files.new_folder(folder) as unfinished:
        llama.write(unfinished, sizes, trees.flatten(params["llama"]), source=tokenizer.parent)
        projector = rules.write(tables.PROJECTOR, trees.flatten(params["projector"]), str(folder))
        files.write(unfinished / PROJECTOR, projector)
        (unfinished / MADE).write_text(json.dumps(dict(made), indent=1) + "\n")


def read_projector(folder: Path, like: Mapping, made: Mapping) -> dict[str, np.ndarray]:
    """The projector of a folder as a tree like `like`. Raises WeightsError where it was made for other patches."""
    path = Path(folder) / MADE
    known = json.loads(path.read_text()) if path.exists() else {}
    wrong = [
        f"{name} {known[name]!r}, not {value!r}" for name, value in made.items() if known.get(name, value) != value
    ]
    if wrong:
        raise WeightsError(f"{folder} was tuned to {'; '.join(wrong)}: its projector reads no other patches")
    weights = Path(folder) / PROJECTOR
    arrays = rules.read(tables.PROJECTOR, files.read(weights), str(weights))
    try:
        return trees.merge(like, trees.unflatten(arrays), str(weights))
    except ValueError as error:
        raise WeightsError(str(error)) from None
