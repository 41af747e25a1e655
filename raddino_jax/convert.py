"""Weights from one format to another: python -m raddino_jax.convert SRC DST --to=hf|torch|orbax.

SRC: a workdir (its teacher), workdir/checkpoints/<step>, a Hugging Face folder, a safetensors, .pth or .bin file,
hf:owner/name, rad_dino or dinov2_*. DST: a new folder.

    hf     config.json, preprocessor_config.json, model.safetensors, README.md: opened by transformers.AutoModel
    torch  backbone_compatible.safetensors: loads strict into the architecture of facebookresearch/dinov2's hub;
           config.json, preprocessor_config.json and README.md beside it
    orbax  a workdir: encoders.load and init= of the pre-training open it

Heads, where there are any, go into dino_head.safetensors and ibot_head.safetensors beside them, as in the RAD-DINO
release.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from raddino_jax import checkpoints, encoders
from raddino_jax.conversion import card, files, formats, huggingface
from raddino_jax.conversion.rules import WeightsError
from raddino_jax.conversion.sources import Source

Arrays = Mapping[str, np.ndarray]


def convert(src: str, dst: str | Path, to: str) -> str:
    """Write DST and return the report. Raises WeightsError, and leaves nothing behind, where it cannot."""
    dst = Path(dst)
    files.check_new(dst)
    if dst.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise WeightsError(f"{dst}: expected the name of a folder; the files in it have names of their own")
    source = encoders.open_source(src, with_heads=True)
    if source.format not in (*formats.DINOV2, "workdir") or "backbone" not in source.modules:
        raise WeightsError(f"{src} holds {source.format} weights; only DINOv2 networks are converted")
    trees = encoders.whole_trees(source)  # what is written must open
    crop, grid = source.preprocess.crop, source.fields["image_size"]
    if crop != grid and not source.fields["registers"]:
        source.notes.append(
            f"films of {crop} pixels on positions stored for {grid}: transformers resizes these without the offset of "
            "DINOv2's hub, so features differ slightly between the two"
        )
    with files.new_folder(dst) as folder:
        WRITERS[to](source, trees, folder)
        report = _report(source, folder, dst)
    return report


# --- the formats --------------------------------------------------------------------------------------------


def _write_hf(source: Source, _, folder: Path) -> None:
    backbone = _completed(source, layerscale=True)
    files.write(folder / "model.safetensors", formats.write("hf_dinov2", backbone, source.what))
    _write_heads(source, folder)
    _write_descriptions(source, folder, card.use_hf(source))


def _write_torch(source: Source, _, folder: Path) -> None:
    backbone = _completed(source, layerscale=False)
    files.write(folder / "backbone_compatible.safetensors", formats.write("dinov2", backbone, source.what))
    _write_heads(source, folder)
    _write_descriptions(source, folder, card.use_torch(source))


def _write_orbax(source: Source, trees: dict, folder: Path) -> None:
    store = checkpoints.Checkpoints(folder)
    store.save(0, {"teacher": trees})
    store.close()
    (folder / "config.json").write_text(json.dumps(_workdir_config(source), indent=2, sort_keys=True) + "\n")


WRITERS = {"hf": _write_hf, "torch": _write_torch, "orbax": _write_orbax}


def _completed(source: Source, layerscale: bool) -> Arrays:
    """The backbone with what a format insists on and this one lacks, where adding it changes nothing."""
    backbone = dict(source.modules["backbone"])
    like, width = backbone["cls_token"], source.fields["width"]
    if "mask_token" not in backbone:
        backbone["mask_token"] = np.zeros((1, width), like.dtype)
        source.notes.append("added a mask token of zeros: there is none in the source")
    if layerscale and not source.fields["layerscale"]:
        for i in range(source.fields["depth"]):
            backbone |= {f"blocks_{i}/ls{n}/gamma": np.ones(width, like.dtype) for n in (1, 2)}
        source.notes.append("added LayerScale of ones: transformers always has it")
    return backbone


def _write_heads(source: Source, folder: Path) -> None:
    for name in formats.HEADS:
        if name in source.modules:
            arrays = formats.write("dino_head", source.modules[name], f"{source.what} ({name})")
            files.write(folder / f"{name}.safetensors", arrays)


def _write_descriptions(source: Source, folder: Path, usage: str) -> None:
    config = huggingface.write_config(source.fields, source.modules["backbone"]["cls_token"].dtype.name)
    preprocess = huggingface.write_preprocess(source.preprocess)
    for name, content in [("config.json", config), ("preprocessor_config.json", preprocess)]:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "README.md").write_text(card.text(source, usage))
    if source.preprocess.standardize:
        source.notes.append(
            "films are standardised one by one, which no processor of transformers does: raddino_jax does it when it "
            "opens this folder; in PyTorch, do it after the processor with the two lines in README.md"
        )


def _workdir_config(source: Source) -> dict:
    """config.json: that of a workdir, or the part of one that says which network it is and how films are prepared."""
    if source.format == "workdir":
        return source.facts["config"] | {"converted_from": source.what}
    registers = source.fields["registers"]
    # Positions are resized in training as the hub does it, whatever transformers does with the same weights.
    resizing = dict(antialias=bool(registers), offset=0.0 if registers else 0.1)
    names = ("width", "depth", "heads", "ffn", "patch_size", "image_size", "registers", "layerscale")
    model = {name: source.fields[name] for name in names} | resizing
    return {
        "task": "pretrain",
        "converted_from": source.what,
        "model": {"variant": "B"} | model,  # the sizes say all; a variant has to be named
        "preprocess": dataclasses.asdict(source.preprocess),
    }


# --- what a person reads --------------------------------------------------------------------------------------

def _report(source: Source, folder: Path, dst: Path) -> str:
    """Every array with its shape, every file with its checksum, and one checksum of the numbers themselves.

    Blocks are alike, so their arrays share a line.
    """
    lines = [f"{source.what} ({source.format}) -> {dst}"]
    for module, arrays in source.modules.items():
        lines.append(f"{module}: {len(arrays)} arrays, {sum(v.size for v in arrays.values()):,} parameters")
        kinds: dict[tuple, int] = {}
        for name, value in arrays.items():
            kind = (re.sub(r"^blocks_\d+", "blocks_*", name), "x".join(map(str, value.shape)), value.dtype.name)
            kinds[kind] = kinds.get(kind, 0) + 1
        lines += [
            f"  {name:32} {shape:>16} {dtype}{f'  x {n}' if n > 1 else ''}"
            for (name, shape, dtype), n in kinds.items()
        ]
    lines += [f"checksum of the arrays: {checksum(source.modules)} (the same in every format)"]
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
            lines.append(f"{dst / path.name}/: {size:,} bytes")
        else:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{dst / path.name}: {path.stat().st_size:,} bytes, sha256 {digest[:16]}")
    return "\n".join([*lines, *(f"note: {note}" for note in source.notes)])


def checksum(modules: Mapping[str, Arrays]) -> str:
    """One for the numbers of all modules, with their names, shapes and types, in any order."""
    digest = hashlib.sha256()
    for module, arrays in sorted(modules.items()):
        for name, value in sorted(arrays.items()):
            digest.update(f"{module}/{name} {value.shape} {value.dtype.name}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m raddino_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC")
    parser.add_argument("dst", metavar="DST")
    parser.add_argument("--to", required=True, choices=WRITERS)
    arguments = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax describes every file it touches
    try:
        print(convert(arguments.src, arguments.dst, arguments.to))
    except (WeightsError, OSError) as error:
        print(f"raddino_jax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
