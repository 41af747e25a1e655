"""PyTorch's .pth, .pt and .bin files without PyTorch, and without running anything that is in them.

Such a file is a zip archive: one pickle that describes the tensors, and their bytes beside it. A pickle may name
any function for the reader to call, so the names that are answered here are the few that tensors need; every
other one is refused before anything happens. TorchScript archives (OpenAI's CLIP) have the same form, and are
read in the same way: their code stays where it is.
"""

import collections
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from raddino_jax.conversion.rules import WeightsError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Inert:
    """Stands for an object of a class that we do not have: it keeps its state and does nothing."""

    def __init__(self, *args):
        self.state: Any = args

    def __setstate__(self, state):
        self.state = state


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    length: int


@dataclass(frozen=True)
class Tensor:
    """Where the numbers of a tensor lie; `read` fetches them."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, storage: np.ndarray) -> np.ndarray:
        # Strides are given by the file: unchecked they could point anywhere in memory.
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        numbers = (self.offset, *self.shape, *self.strides)
        if min(numbers) < 0 or (0 not in self.shape and last >= storage.size):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [step * storage.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, strides, writeable=False)
        return view if view.flags.c_contiguous else view.copy()


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return Tensor(storage, offset, tuple(shape), tuple(strides))


_ANSWERED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): tuple,
    # Settings that training scripts save beside the weights; the first is in MRM's file.
    **dict.fromkeys(
        [("argparse", "Namespace"), ("torch", "device"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")],
        Inert,
    ),
    **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module, name):
        if module == "__torch__" or module.startswith("__torch__."):  # a module of a TorchScript archive
            return Inert
        if (module, name) not in _ANSWERED:
            raise WeightsError(
                f"it asks to run {module}.{name}, which weights do not need: refused, nothing was run"
            )
        return _ANSWERED[module, name]

    def persistent_load(self, saved_id):
        kind, dtype, key, _, length = saved_id
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError("an unknown kind of storage")
        return _Storage(dtype, key, length)


def read(path: Path) -> dict[str, np.ndarray]:
    """The weights of a .pth, .pt or .bin file by name. Raises WeightsError for whatever is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = next(
                (n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")), None
            )
            if inside is None:
                raise WeightsError("a zip archive without weights in it")
            if f"{inside}byteorder" in archive.namelist() and archive.read(f"{inside}byteorder") != b"little":
                raise WeightsError("weights in big-endian byte order")
            with archive.open(f"{inside}data.pkl") as file:
                named = weights_of(_Reader(file).load())
            storages = {}  # shared ones are read once
            for tensor in named.values():
                _fetch(archive, inside, tensor.storage, storages)
            return {name: tensor.read(storages[tensor.storage.key]) for name, tensor in named.items()}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # damaged bytes make zipfile and pickle raise nearly anything
        raise WeightsError(f"{path}: damaged or cut off ({type(error).__name__}: {error})") from None


def _fetch(archive: zipfile.ZipFile, inside: str, storage: _Storage, storages: dict) -> None:
    if storage.key in storages:
        return
    values = np.frombuffer(archive.read(f"{inside}data/{storage.key}"), storage.dtype)
    if values.size < storage.length:
        raise ValueError(f"expected {storage.length} numbers, found {values.size}")
    storages[storage.key] = values


def weights_of(content: Any, is_tensor=lambda value: isinstance(value, Tensor)) -> dict[str, Any]:
    """The state dict inside what a file holds: itself, or under one of the usual keys.

    Raises WeightsError that lists what is there instead.
    """
    if isinstance(content, Inert):
        return _attributes(content)
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if is_tensor(value)}
        if tensors:
            return tensors
        for key in ("teacher", "model", "state_dict", "model_state_dict"):
            if isinstance(content.get(key), dict):
                return weights_of(content[key], is_tensor)
        raise WeightsError(
            f"expected weights by name, found a dict of {', '.join(map(str, content)) or 'nothing'}"
        )
    raise WeightsError(f"expected weights by name, found {type(content).__name__}")


def _attributes(module: Inert, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a TorchScript module and the modules in it, named as their state dict names them."""
    found = {}
    for name, value in module.state.items() if isinstance(module.state, dict) else ():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, Inert):
            found |= _attributes(value, f"{prefix}{name}.")
    return found
