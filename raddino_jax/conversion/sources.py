"""What a weights file or a Hugging Face folder holds: modules, the network they fit, preprocessing, where from."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raddino_jax.conversion import files, formats, huggingface
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.conversion.rules import WeightsError

Arrays = Mapping[str, np.ndarray]

RELEASED_WIDTHS = (384, 768, 1024, 1536)  # of DINOv2's S, B, L and g


@dataclass
class Source:
    """Weights with what is needed to use them.

    what: how messages name it. format: a key of formats.FORMATS, or "workdir".
    modules: {"backbone" | "dino_head" | "ibot_head": our arrays by name}, in the types they are stored in.
    fields: of the network (models.vit.ViT, models.clip.CLIPViT). preprocess: None where nothing states it.
    facts: about the training, for the card. notes: lines for a person: what was assumed, what came from where.
    """

    what: str
    format: str
    modules: dict[str, Arrays]
    fields: dict
    preprocess: Preprocess | None
    facts: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_path(path: Path, among: Sequence[str] = (), with_heads: bool = False) -> Source:
    """A weights file, an index of shards, or a folder with one of them.

    among: formats to expect, all by default. with_heads: read a folder's dino_head.safetensors too.
    Raises WeightsError that says what is there instead.
    """
    folder = path if path.is_dir() else path.parent
    file = files.find(path) if path.is_dir() else path
    if file is None and (path / "config.json").is_file() and (path / "starts.jsonl").is_file():
        raise WeightsError(f"{path} is the workdir of a run without a checkpoint yet: start it again, or name another")
    if file is None:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".bin", ".safetensors"))
        hint = f"; for one of {', '.join(others[:6])} give the path of the file itself" if others else ""
        raise WeightsError(f"{path}: no weights in this folder (expected one of {', '.join(files.NAMES)}){hint}")
    if not file.exists():
        raise WeightsError(f"{path} is not there")
    name, modules = formats.read(files.read(file), str(file), among)
    notes = [f"{module} from {file} ({name})" for module in modules]
    if with_heads and path.is_dir():
        for module in formats.HEADS:
            if (head := folder / f"{module}.safetensors").is_file():
                _, found = formats.read(files.read(head), str(head), ("dino_head",))
                modules[module] = found["dino_head"]
                notes.append(f"{module} from {head}")
    return Source(str(path), name, modules, {}, None, notes=notes)


def describe(source: Source, path: Path) -> Source:
    """The source with fields and preprocessing, from the JSON files beside its weights or the arrays themselves.

    Raises WeightsError for formats whose files do not say it.
    """
    folder = path if path.is_dir() else path.parent
    config, preprocessor = (folder / name for name in ("config.json", "preprocessor_config.json"))
    if "backbone" not in source.modules:
        raise WeightsError(f"{source.what} holds {', '.join(source.modules)}: no encoder")
    if source.format not in (*formats.DINOV2, "clip_hf"):
        raise WeightsError(
            f"{source.what} holds {source.format} weights, whose files do not say how films are prepared; "
            "load them by the name of the encoder, with this path as its weights"
        )
    stated = None
    if config.is_file() and "model_type" in (content := huggingface.read_json(config)):
        kind, stated = huggingface.read_config(content, str(config))
        if (kind == "clip_hf") != (source.format == "clip_hf"):
            raise WeightsError(
                f"{config} describes a {kind} network, {source.what} holds a {source.format} one"
            )
    if source.format in formats.DINOV2:
        heads = stated["heads"] if stated else 0
        source.fields = dinov2_fields(source.modules["backbone"], source.what, source.notes, heads)
        agree(source.fields, stated or {}, source.what)
        if source.format == "hf_dinov2":  # transformers has no offset where it resizes position embeddings
            source.fields["offset"] = 0.0
    elif stated is None:
        raise WeightsError(
            f"{source.what}: no config.json beside these weights; load them by an encoder's name"
        )
    else:
        projection = source.modules["backbone"].get("proj/kernel", np.zeros((0, 0)))
        source.fields = stated | dict(projection=projection.shape[1])
    if preprocessor.is_file():
        source.preprocess = huggingface.read_preprocess(huggingface.read_json(preprocessor), str(preprocessor))
    return source


def dinov2_fields(arrays: Arrays, what: str, notes: list[str], heads: int = 0) -> dict:
    """The fields of models.vit.ViT that DINOv2 arrays fit, positions resized as the hub does.

    heads: of attention, which arrays do not tell; 0: heads of 64 channels, a note that says so, and a warning where
      no released network has this width.
    Raises WeightsError where whole parts are missing.
    """
    needed = ("cls_token", "pos_embed", "patch_embed/kernel", "blocks_0/norm1/scale", "norm/scale")
    if missing := [name for name in needed if name not in arrays]:
        raise WeightsError(f"{what}: no whole vision transformer, it lacks {', '.join(missing)}")
    width, patch = arrays["cls_token"].shape[-1], arrays["patch_embed/kernel"].shape[0]
    side = round((arrays["pos_embed"].shape[1] - 1) ** 0.5)
    if side**2 != arrays["pos_embed"].shape[1] - 1:
        raise WeightsError(f"{what}: {arrays['pos_embed'].shape[1]} position embeddings are no square and one")
    blocks = [int(hit[1]) for name in arrays if (hit := re.match(r"blocks_(\d+)/", name))]
    registers = arrays["register_tokens"].shape[1] if "register_tokens" in arrays else 0
    if not heads:
        heads = _heads(width, what)
        notes.append(f"{heads} heads of 64, as in every released DINOv2: the file does not say")
        if width not in RELEASED_WIDTHS:
            notes[-1] += (
                f", and none of those has a width of {width}. With another number of heads the features would be "
                "wrong: a config.json beside the file can say it"
            )
            warnings.warn(f"{what}: {notes[-1]}", stacklevel=2)
    return dict(
        width=width,
        depth=max(blocks) + 1,
        heads=heads,
        ffn="swiglu" if "blocks_0/mlp/w12/kernel" in arrays else "mlp",
        patch_size=patch,
        image_size=side * patch,
        registers=registers,
        layerscale=float("blocks_0/ls1/gamma" in arrays),
        mask_token="mask_token" in arrays,
        antialias=bool(registers),
        offset=0.0 if registers else 0.1,
    )


def agree(fields: Mapping, stated: Mapping, what: str) -> None:
    """Raise WeightsError where the fields told from arrays differ from those that a config states."""
    differing = [
        f"{k}: {fields[k]} in the weights, {v} in config.json" for k, v in stated.items() if fields[k] != v
    ]
    if differing:
        raise WeightsError(f"{what}: another network than its config.json says: {'; '.join(differing)}")


def _heads(width: int, what: str) -> int:
    if width % 64:
        raise WeightsError(
            f"{what}: a width of {width} is no multiple of 64, so the number of heads cannot be told; "
            "a config.json beside the file can say it"
        )
    return width // 64
