"""README.md of a converted folder: what is known of the weights, and code that uses them as it stands."""

from pathlib import Path
from statistics import mean

from raddino_jax.conversion.sources import Source

# The code runs as it stands, but for the names in capitals: those of the folder and of a film are the user's to give.
OPEN_HF = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("THIS FOLDER")
"""
OPEN_TORCH = """\
import torch
from dinov2.models.vision_transformer import DinoVisionTransformer  # of github.com/facebookresearch/dinov2
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

model = DinoVisionTransformer(SETTINGS).eval()
model.load_state_dict(load_file("THIS FOLDER/backbone_compatible.safetensors"))
"""
PREPARE = """\
# Pillow resizes as in training (transformers 4: use_fast=False); the default backend is close to it, not equal.
processor = AutoImageProcessor.from_pretrained("THIS FOLDER", backend="pil")
film = Image.open("FILM.png").convert("L")  # 8-bit grey, bright bone
pixels = processor(film, return_tensors="pt")["pixel_values"]
"""
STANDARDIZE = """\
# This network saw films standardised one by one: without these two lines its features are wrong.
pixels = pixels - pixels.mean((1, 2, 3), keepdim=True)
pixels = pixels / (pixels.square().mean((1, 2, 3), keepdim=True) + GREY_LEVEL**2).sqrt()
"""
RUN_HF = """\
with torch.no_grad():
    out = model(pixels)
cls, patches = out.pooler_output, out.last_hidden_state[:, FIRST:]
"""
RUN_TORCH = """\
with torch.no_grad():
    out = model.forward_features(pixels)
cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
"""


def use_hf(source: Source) -> str:
    """Code that opens a folder with transformers."""
    return OPEN_HF + PREPARE + _standardize(source) + RUN_HF.replace("FIRST", str(1 + source.fields["registers"]))


def use_torch(source: Source) -> str:
    """Code that opens a folder with the code of DINOv2's hub."""
    fields = source.fields
    named = dict(img_size="image_size", patch_size="patch_size", embed_dim="width", depth="depth", num_heads="heads")
    settings = {theirs: fields[ours] for theirs, ours in named.items()} | {"block_chunks": 0}
    if fields["layerscale"]:
        settings["init_values"] = 1.0
    if fields["ffn"] == "swiglu":
        settings["ffn_layer"] = "swiglufused"
    if fields["registers"]:
        settings |= dict(num_register_tokens=fields["registers"], interpolate_antialias=True, interpolate_offset=0.0)
    stated = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return OPEN_TORCH.replace("SETTINGS", stated) + PREPARE + _standardize(source) + RUN_TORCH


def _standardize(source: Source) -> str:
    """The lines that a film standardised by itself needs; the processor has brought a grey level to another size."""
    if not source.preprocess.standardize:
        return ""
    return STANDARDIZE.replace("GREY_LEVEL", f"(1 / 255 / {mean(source.preprocess.std):.6g})")


def text(source: Source, usage: str) -> str:
    """README.md of a folder: what is known, the code that uses it, and where to fill in the rest."""
    lines = ["---", "library_name: transformers", "tags: [chest-x-ray, dinov2, self-supervised]", "---", ""]
    lines += ["# Model card", ""]
    if "synthetic" in source.facts.get("config", {}).get("data", {}).get("sources", ()):
        lines += ["**Trained on synthetic radiographs: not for use on patients.**", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _known(source).items()), ""]
    lines += [f"```python\n{usage}```", ""]
    lines += ["Written by raddino_jax. To be filled in: intended use, licence, patients and hospitals, known failures."]
    return "\n".join([*lines, ""])


def _known(source: Source) -> dict[str, str]:
    """What the weights and the config of their training say."""
    fields, settings, config = source.fields, source.preprocess, source.facts.get("config", {})
    standardized = ", then standardised one by one (zero mean, unit variance)" if settings.standardize else ""
    known = {
        "Network": f"ViT, width {fields['width']}, {fields['depth']} blocks, {fields['heads']} heads, "
        f"patch {fields['patch_size']}, {fields['registers']} registers",
        "Parameters": f"{sum(v.size for v in source.modules['backbone'].values()):,}",
        "Input": f"short side {settings.resize} ({settings.resample}), centre {settings.crop} x {settings.crop}, "
        f"mean {_list(settings.mean)}, std {_list(settings.std)}{standardized}",
        "Converted from": Path(source.what).name,
    }
    if config.get("data", {}).get("sources"):
        known |= {
            "Data": ", ".join(config["data"]["sources"]),
            "Steps": f"{source.facts['step']} of {config.get('batch_size', '?')} films",
            "Started from": config.get("init") or "random weights",
        }
    return known


def _list(values) -> str:
    return "/".join(f"{value:g}" for value in values)
