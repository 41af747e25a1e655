"""Llama and Vicuna as Hugging Face folders: config.json beside weights in one file or in shards."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raddino_jax.conversion import files, rules, tables
from raddino_jax.conversion.formats import Format
from raddino_jax.conversion.rules import WeightsError

# Older releases store the rotary frequencies, which follow from the config.
FORMAT = Format(r"^model\.embed_tokens\.weight$", tables.LLAMA, dropped=(r"rotary_emb\.inv_freq$",))

# Fields of models.llama.Llama by their names in config.json.
SIZES = {
    "vocab_size": "vocabulary",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "max_position_embeddings": "positions",
    "rms_norm_eps": "eps",
}
SHARD = 5 * 10**9  # bytes in a file, as Hugging Face cuts them
# What releases have beside the weights for whoever turns text into tokens and back.
TOKENIZER = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json",
)  # fmt: skip


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A folder -> (fields of `models.llama.Llama`, its parameters by name). Nothing in the files is run.

    Raises WeightsError for whatever is no Llama of the second generation without extras.
    """
    folder = Path(folder)
    sizes = read_sizes(folder / "config.json")
    weights = files.find(folder)
    if weights is None:
        raise WeightsError(f"{folder}: expected one of {', '.join(files.NAMES)}, found none")
    return sizes, FORMAT.read(files.read(weights), str(weights))


def read_sizes(path: Path) -> dict[str, Any]:
    """A config.json -> fields of `models.llama.Llama`. Raises WeightsError as `read` does."""
    try:
        config = json.loads(path.read_text())
        sizes = {ours: config[theirs] for theirs, ours in SIZES.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: no config of a Llama ({type(error).__name__}: {error})") from None
    # transformers 5 gathers what the release and version 4 have at the top and in rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    expected = {
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": sizes["heads"],
        "head_dim": sizes["width"] // sizes["heads"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    # null stands for the default too.
    wrong = [f"{k} {config[k]!r}, not {v!r}" for k, v in expected.items() if config.get(k) not in (None, v)]
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        wrong.append(f"rotary scaling {scaling!r}, not 'default'")
    if wrong:
        raise WeightsError(f"{path}: expected a plain Llama 2 or Vicuna v1.5, found {'; '.join(wrong)}")
    return sizes | {"theta": float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))}


def write(
    folder: Path,
    sizes: Mapping[str, Any],
    ours: Mapping[str, np.ndarray],
    source: Path | None = None,
    shard: int = SHARD,
) -> None:
    """The inverse of `read`, as safetensors: a new folder that transformers opens, there whole or not at all.

    source: the folder from which the weights came, whose tokenizer goes along. shard: bytes in a file at most.
    Raises WeightsError where there is something already.
    """
    folder = Path(folder)
    files.check_new(folder)
    foreign = rules.write(tables.LLAMA, ours, str(folder))
    with files.new_folder(folder) as unfinished:
        _write_weights(unfinished, foreign, shard)
        (unfinished / "config.json").write_text(json.dumps(_config(sizes, foreign), indent=2) + "\n")
        for path in (Path(source) / name for name in TOKENIZER) if source else ():
            if path.is_file():
                shutil.copyfile(path, unfinished / path.name)


def _write_weights(folder: Path, foreign: Mapping[str, np.ndarray], shard: int) -> None:
    parts = list(_parts(foreign, shard))
    names = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        files.write(folder / file, part)
        names |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in foreign.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _parts(arrays: Mapping[str, np.ndarray], limit: int) -> Iterator[dict[str, np.ndarray]]:
    part, size = {}, 0
    for name, value in arrays.items():
        if part and size + value.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = value
        size += value.nbytes
    yield part


def _config(sizes: Mapping[str, Any], foreign: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: sizes[ours] for theirs, ours in SIZES.items()},
        "num_key_value_heads": sizes["heads"],
        "rope_theta": sizes["theta"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(foreign["model.norm.weight"].dtype),
    }
