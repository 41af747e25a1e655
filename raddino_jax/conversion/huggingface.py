"""Hugging Face folders: what config.json and preprocessor_config.json say, either way, and files from the Hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raddino_jax.conversion import files
from raddino_jax.conversion.rules import WeightsError

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
STANDARDIZE = "standardize"  # our own entry in preprocessor_config.json: transformers keeps it, and does nothing


@dataclass(frozen=True)
class Preprocess:
    """From a film, uint8 [H, W], to the square that a network sees.

    resize: the shorter side is brought to this, `resample` as Pillow does it. crop: side of the centre square.
    mean, std: one per colour channel, or one for all, of grey values in [0, 1] times `scale`.
    centre: how half a pixel is rounded where the margins differ: "floor" as Hugging Face, "round" as torchvision.
    stretch: each film is first mapped from its minimum and maximum to 0 and 255 (BioViL-T).
    pad: instead, the longer side is brought to this, the shorter one padded with black, and the square of
      `pad` pixels is resized to `crop` after normalisation (CheXzero); 0 leaves that out.
    standardize: instead of all films' `mean` and `std`, each square gets zero mean and unit variance of its own.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str = "bicubic"
    scale: float = 1.0
    centre: str = "floor"
    stretch: bool = False
    pad: int = 0
    standardize: bool = False


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises WeightsError where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: expected a JSON object ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


# --- config.json --------------------------------------------------------------------------------------------


def read_config(config: Mapping[str, Any], what: str) -> tuple[str, dict]:
    """config.json -> (format, fields of the network).

    Raises WeightsError for another architecture, and for settings that the networks here do not have.
    """
    kind = config.get("model_type")
    if kind in ("dinov2", "dinov2_with_registers"):
        return "hf_dinov2", _dinov2_fields(config, what)
    if kind in ("clip", "clip_vision_model"):
        vision = {**config, **config.get("vision_config", {})}
        return "clip_hf", _clip_fields(vision, what)
    raise WeightsError(
        f"{what}: expected model_type dinov2, dinov2_with_registers, clip or clip_vision_model, found {kind!r}"
    )


def _asked(config: Mapping[str, Any], what: str, **expected) -> None:
    """Refuse settings other than those the network is built with; absent ones have the expected default."""
    differing = [f"{k}={config[k]!r} (expected {v!r})" for k, v in expected.items() if config.get(k, v) != v]
    if differing:
        raise WeightsError(f"{what}: settings that are not supported: {', '.join(differing)}")


def _sizes(config: Mapping[str, Any], what: str) -> dict:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    missing = [name for name in names if not isinstance(config.get(name), int)]
    if missing:
        raise WeightsError(f"{what}: expected whole numbers for {', '.join(missing)}")
    return dict(
        zip(("width", "depth", "heads", "patch_size", "image_size"), map(config.get, names), strict=True)
    )


def _dinov2_fields(config: Mapping[str, Any], what: str) -> dict:
    _asked(config, what, hidden_act="gelu", layer_norm_eps=1e-6, mlp_ratio=4, qkv_bias=True, num_channels=3)
    registers = config.get("num_register_tokens", 4) if config["model_type"] == "dinov2_with_registers" else 0
    return _sizes(config, what) | dict(
        ffn="swiglu" if config.get("use_swiglu_ffn") else "mlp", registers=registers
    )


def _clip_fields(config: Mapping[str, Any], what: str) -> dict:
    _asked(config, what, hidden_act="quick_gelu", layer_norm_eps=1e-5, num_channels=3)
    fields = _sizes(config, what)
    _asked(config, what, intermediate_size=4 * fields["width"])
    return fields


def write_config(fields: Mapping[str, Any], dtype: str) -> dict:
    """config.json of a DINOv2 network, for Dinov2Model or, with registers, Dinov2WithRegistersModel."""
    registers = fields["registers"]
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": fields["width"],
        "num_hidden_layers": fields["depth"],
        "num_attention_heads": fields["heads"],
        "image_size": fields["image_size"],
        "patch_size": fields["patch_size"],
        "use_swiglu_ffn": fields["ffn"] == "swiglu",
        "layerscale_value": 1.0,
        "num_channels": 3,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "torch_dtype": dtype,
    }
    return config | ({"num_register_tokens": registers} if registers else {})


# --- preprocessor_config.json -------------------------------------------------------------------------------


def read_preprocess(config: Mapping[str, Any], what: str) -> Preprocess:
    """preprocessor_config.json -> Preprocess. Raises WeightsError for steps that are not known here."""
    _asked(config, what, do_normalize=True, do_rescale=True, do_resize=True)
    size = _side(config.get("size"), ("shortest_edge",), f"{what}: size")
    crop = _side(config.get("crop_size"), ("height", "width"), f"{what}: crop_size")
    if not config.get("do_center_crop", True):
        raise WeightsError(f"{what}: expected a centre crop: films are not square, and the network's input is")
    resample = RESAMPLE.get(config.get("resample", 3))
    factor = config.get("rescale_factor", 1 / 255)
    if resample is None or abs(factor * 255 - 1) > 1e-6 or crop > size:
        raise WeightsError(
            f"{what}: expected bicubic or bilinear resizing, rescale_factor 1/255 and a crop inside the film, "
            f"found resample={config.get('resample')}, rescale_factor={factor}, size={size}, crop_size={crop}"
        )
    mean, std = (tuple(float(v) for v in config.get(key, ())) for key in ("image_mean", "image_std"))
    if not (len(mean) == len(std) == 3):
        raise WeightsError(f"{what}: expected image_mean and image_std of three channels")
    if len(set(mean)) == len(set(std)) == 1:
        mean, std = mean[:1], std[:1]
    return Preprocess(size, crop, mean, std, resample, standardize=bool(config.get(STANDARDIZE, False)))


def _side(value, keys: tuple[str, ...], what: str) -> int:
    sides = {value.get(key) for key in keys} if isinstance(value, Mapping) else {value}
    if len(sides) > 1 or not isinstance(side := sides.pop(), int):
        raise WeightsError(f"{what}: expected one side in pixels ({', '.join(keys)}), found {value!r}")
    return side


def write_preprocess(settings: Preprocess) -> dict:
    """preprocessor_config.json in the form of the RAD-DINO release, and STANDARDIZE where films are standardised."""
    config = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": settings.resize},
        "resample": next(number for number, name in RESAMPLE.items() if name == settings.resample),
        "do_center_crop": True,
        "crop_size": {"height": settings.crop, "width": settings.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.mean * 3)[:3],
        "image_std": list(settings.std * 3)[:3],
    }
    return config | ({STANDARDIZE: True} if settings.standardize else {})


# --- the Hub ------------------------------------------------------------------------------------------------


def fetch_folder(repository: str) -> Path:
    """The snapshot folder of a Hub repository, with its config, preprocessing and weights in it.

    Raises WeightsError that says what is missing, and what to do where the Hub cannot be reached.
    """
    folder = fetch(repository, "config.json").parent
    fetch(repository, "preprocessor_config.json", optional=True)
    found = next((path for name in files.NAMES if (path := fetch(repository, name, optional=True))), None)
    if found is None:
        raise WeightsError(f"{repository} has no weights that can be reached (one of {', '.join(files.NAMES)})")
    if found.name.endswith(".index.json"):
        for name in sorted(set(read_json(found).get("weight_map", {}).values())):
            fetch(repository, name)
    return folder


def fetch(repository: str, name: str, optional: bool = False) -> Path | None:
    """A file of a Hub repository, from the local cache or else downloaded; None for an optional one it lacks.

    Raises WeightsError that says what to do where the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, name, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise WeightsError(f"{repository!r} is no name of a repository: expected hf:owner/name") from None
    try:
        return Path(hf_hub_download(repository, name))
    except RepositoryNotFoundError:
        raise WeightsError(f"the Hugging Face Hub has no public repository {repository!r}") from None
    except LocalEntryNotFoundError as error:  # offline, and not in the cache
        if optional:
            return None
        raise WeightsError(
            f"{name} of {repository} is not in the local cache, and the Hugging Face Hub cannot be reached. Where it "
            f"can, run `hf download {repository}`; then bring the files here and give their folder as the weights"
        ) from error
    except EntryNotFoundError:
        if optional:
            return None
        raise WeightsError(f"{repository} on the Hugging Face Hub has no file {name}") from None
    except OSError as error:
        raise WeightsError(f"{name} of {repository}: the download failed ({error})") from None
