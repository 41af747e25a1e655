"""The device mesh, (pattern -> PartitionSpec) rules, and arrays that are born where they live.

One mesh with two axes: `data` and `fsdp`. A batch is split over both, parameters over `fsdp` by rule.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from raddino_jax import params as trees

BATCH = P(("data", "fsdp"))

# mallopt's names in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Column-split for layers that widen, row-split for layers that narrow, prototypes by prototype. Names of the
# optimiser's moments and of the teacher end in the same way as the student's.
PARAMETER_RULES = [
    (r"(qkv|fc1|w12|mlp_0|mlp_2)/kernel$", P(None, "fsdp")),
    (r"(proj|fc2|w3|mlp_4)/kernel$", P("fsdp", None)),
    (r"last_layer/weight_[gv]$", P("fsdp", None)),
    (r"/(q|k|v|gate|up|lm_head)/(kernel|b)$", P(None, "fsdp")),
    (r"/(o|down)/(kernel|a)$|llama/words$", P("fsdp", None)),
    (r"", P()),
]


def make_mesh(devices: Sequence[jax.Device], fsdp: int = 1) -> Mesh:
    """Mesh (data, fsdp) over all devices. Raises ValueError when `fsdp` does not divide them."""
    if len(devices) % fsdp:
        raise ValueError(f"config.mesh.fsdp={fsdp} does not divide {len(devices)} devices; use a divisor")
    grid = np.asarray(devices).reshape(-1, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def keep_memory() -> None:
    """On a CPU, let every step have the memory of the one before it. Call it before the first use of a device.

    What a step needs in between is one allocation of gigabytes. glibc hands it back to the system after each step, and
    the next one gets it anew, zeroed page by page: a quarter of a step's time. Here freed memory is kept, and programs
    run on the thread that calls them, so that nobody else's allocation comes to lie in the gap. Changes nothing on
    accelerators, with virtual devices, in one of several processes, or where the C library is not glibc.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)


def shardings(tree, mesh: Mesh):
    """NamedSharding for every leaf of a tree of arrays or shapes, by PARAMETER_RULES on its path.

    A dimension that the axis does not divide stays whole: small heads need not be padded.
    """
    rules = [(pattern, spec) for pattern, spec in PARAMETER_RULES]

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = trees.match(rules, [name])[name]
        fits = len(spec) <= leaf.ndim and all(
            axis is None or leaf.shape[i] % mesh.shape[axis] == 0 for i, axis in enumerate(spec)
        )
        return NamedSharding(mesh, spec if fits else P())

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree, mesh: Mesh):
    """A tree of arrays, the same on every host or on devices already -> the tree over the mesh, by `shardings`.

    Each device is handed its part alone: what is larger than a device's memory fits.
    """
    def one(array, where):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, where)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(one, tree, shardings(tree, mesh))


def born_sharded(init: Callable, mesh: Mesh, *args):
    """`init(*args)`, jitted so that every array is created in its place."""
    target = shardings(jax.eval_shape(init, *args), mesh)
    return jax.jit(init, out_shardings=target)(*args)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the first axis of every array of a batch is split."""
    return NamedSharding(mesh, BATCH)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
