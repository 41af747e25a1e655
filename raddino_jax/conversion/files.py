"""Weights files on disk: safetensors, PyTorch files, both also in several shards. Told by content, not by name."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from raddino_jax.conversion import pickles
from raddino_jax.conversion.rules import WeightsError

# In a folder the first of these that is there is read.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "backbone_compatible.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a weights file by name, of all shards where it is an index.

    Raises WeightsError that says what the file is instead; nothing in it is ever run.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None
    if head[:4] == b"PK\x03\x04":
        return pickles.read(path)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return _read_old_pickle(path)
    raise WeightsError(f"{path}: expected weights (safetensors or a PyTorch file), found {_what(head)}")


STRANGERS = (
    (b"version https://git-lfs", "a git-lfs pointer (`git lfs pull` fetches the file)"),
    (b"<", "an HTML or XML page"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
)


def _what(head: bytes) -> str:
    if not head:
        return "an empty file"
    return next((name for magic, name in STRANGERS if head.lstrip().startswith(magic)), "something else")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: no whole safetensors file ({error})") from None


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        shards = json.loads(index.read_text())["weight_map"]
        names = sorted(set(shards.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: no index of weights ({type(error).__name__})") from None
    if any(not re.fullmatch(r"[\w.-]+", name) for name in names):
        raise WeightsError(f"{index}: expected names of files beside it, found {', '.join(names)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(f"{index}: {len(missing)} of {len(names)} shards are not there: {', '.join(missing)}")
    arrays = {}
    for name in names:
        arrays |= read(index.parent / name)
    lacking = sorted(shards.keys() - arrays.keys())
    if lacking:
        raise WeightsError(f"{index}: its shards lack {', '.join(lacking[:6])}")
    return arrays


def _read_old_pickle(path: Path) -> dict[str, np.ndarray]:
    """The form before PyTorch 1.6, of which only PyTorch knows the details."""
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f'{path}: a PyTorch file from before 2020; reading it needs torch (pip install "raddino_jax[convert]")'
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        named = pickles.weights_of(content, torch.is_tensor)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # the unpickler raises nearly anything on bytes that are no pickle
        # Its own message would advise to read the file once more, and run what is in it.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise WeightsError(
                f"{path}: it asks to run {asked[1]}, which weights do not need: refused, nothing was run"
            ) from None
        raise WeightsError(f"{path}: damaged or cut off, or no PyTorch file ({type(error).__name__})") from None
    return {name: _from_torch(value.detach()) for name, value in named.items()}


def _from_torch(tensor) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:  # which torch does not hand to numpy
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays to a new safetensors file, marked as PyTorch's: transformers asks for that."""
    path.touch()  # with the permissions that the user's other files have
    mode = path.stat().st_mode
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path, {"format": "pt"})
    path.chmod(mode)  # which safetensors takes away from everybody else


def check_new(folder: Path) -> None:
    """Raise WeightsError where there is something at a place that is to become a folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise WeightsError(f"{folder} is there already; give another place, or delete it first")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that becomes it when all has gone well, and is deleted otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.unfinished-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def find(folder: Path) -> Path | None:
    """The weights file of a folder, None where it has none."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)
