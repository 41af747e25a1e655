"""Meshes: arrays are born in their place, and every mesh walks the same trajectory."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import multicxr
from raddino_jax import params as trees
from raddino_jax import sharding, train
from raddino_jax.data import pipeline

# Everything random is on: drop path, masks and every augmentation. What would magnify rounding is
# off: Adam's eps is large, for with 1e-8 its first step is a sign; and the first block drops nothing,
# for class tokens that no image has reached are equal, and KoLeo divides by their distance.
TINY = (
    "compute_dtype=float32,batch_size=16,group_size=2,koleo_group=8,model.width=32,model.depth=2,"
    "model.heads=2,model.patch_size=4,model.image_size=16,model.drop_path=0.5,"
    "model.drop_path_uniform=False,views.global_size=16,views.local_size=8,head.prototypes=32,"
    "head.hidden=32,head.bottleneck=16,head.layers=2,data.image_size=20,data.threads=2,"
    "optim.eps=0.1,optim.warmup=(1,'steps'),optim.freeze_last_layer=(1,'steps'),"
    "optim.teacher_temperature=(0.04,0.04)"
)
STEPS = 3


# --- places -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_a_mesh_has_the_axes_data_and_fsdp_over_all_devices(fsdp):
    mesh = sharding.make_mesh(jax.devices(), fsdp)
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert list(mesh.devices.flat) == jax.devices()


def test_an_fsdp_axis_that_does_not_divide_the_devices_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"fsdp=3 does not divide 8"):
        sharding.make_mesh(jax.devices(), 3)


EXPECTED = {
    "backbone/blocks_0/attn/qkv/kernel": P(None, "fsdp"),
    "backbone/blocks_0/attn/qkv/bias": P(),
    "backbone/blocks_0/attn/proj/kernel": P("fsdp", None),
    "backbone/blocks_0/mlp/fc1/kernel": P(None, "fsdp"),
    "backbone/blocks_0/mlp/fc2/kernel": P("fsdp", None),
    "backbone/blocks_0/mlp/w12/kernel": P(None, "fsdp"),
    "backbone/blocks_0/mlp/w3/kernel": P("fsdp", None),
    "backbone/patch_embed/kernel": P(),
    "backbone/pos_embed": P(),
    "dino_head/mlp_0/kernel": P(None, "fsdp"),
    "dino_head/mlp_2/kernel": P(None, "fsdp"),
    "dino_head/mlp_4/kernel": P("fsdp", None),
    "dino_head/last_layer/weight_v": P("fsdp", None),
    "dino_head/last_layer/weight_g": P("fsdp", None),
}


def _shape(name: str) -> tuple[int, ...]:
    if name.endswith("bias"):
        return (8,)
    return (2, 2, 3, 8) if "patch_embed" in name else (8, 1) if "weight_g" in name else (8, 16)


def test_layers_that_widen_are_split_by_column_and_layers_that_narrow_by_row():
    tree = trees.unflatten({n: jax.ShapeDtypeStruct(_shape(n), jnp.float32) for n in EXPECTED})
    mesh = sharding.make_mesh(jax.devices(), 4)
    for prefix, wrapped in [("", tree), ("0/mu/", [{"mu": tree}]), ("student/", {"student": tree})]:
        found = sharding.shardings(wrapped, mesh)
        paths, _ = jax.tree.flatten_with_path(found)
        by_name = {jax.tree_util.keystr(p, simple=True, separator="/"): s for p, s in paths}
        for name, spec in EXPECTED.items():
            assert by_name[prefix + name] == NamedSharding(mesh, spec), name


def test_a_dimension_that_the_axis_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(jax.devices(), 4)
    odd = {"last_layer": {"weight_v": jax.ShapeDtypeStruct((6, 4), jnp.float32)}}
    assert sharding.shardings(odd, mesh)["last_layer"]["weight_v"].spec == P()


def test_arrays_are_born_in_their_place_and_never_whole_on_one_device():
    mesh = sharding.make_mesh(jax.devices(), 8)

    def init(key):
        return {"fc1": {"kernel": jax.random.normal(key, (4, 64))}, "step": jnp.zeros(())}

    born = sharding.born_sharded(init, mesh, jax.random.key(0))
    kernel = born["fc1"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(4, 8)] * 8
    assert len(born["step"].devices()) == 8
    whole = jax.jit(init)(jax.random.key(0))["fc1"]["kernel"]
    np.testing.assert_allclose(kernel, whole, rtol=1e-6)  # the same numbers: float32


def test_a_batch_is_split_over_both_axes_in_the_order_of_its_rows():
    mesh = sharding.make_mesh(jax.devices(), 2)
    images = np.arange(16 * 3).reshape(16, 3).astype(np.uint8)
    found = sharding.to_devices({"images": images}, mesh)["images"]
    assert found.dtype == jnp.uint8 and found.sharding == sharding.batch_sharding(mesh)
    rows = {s.device: np.asarray(s.data) for s in found.addressable_shards}
    for i, device in enumerate(jax.devices()):
        np.testing.assert_array_equal(rows[device], images[2 * i : 2 * i + 2])


# --- the same trajectory ------------------------------------------------------------------------


def _batches(config) -> list[dict]:
    """As the pipeline makes them, of noise."""
    rng = np.random.default_rng(0)
    side = config.data.image_size
    spec = pipeline.MaskSpec(config.group_size, 16, 4, 0.5, (0.1, 0.5))
    rows = pipeline.Rows(0, config.batch_size, config.batch_size)
    source = _Noise(rng.integers(0, 256, (64, side, side), np.uint8))
    found = pipeline.batches(
        config.data, rows=rows, steps=STEPS, start=0, seed=0, masks=spec, sources=[source]
    )
    return list(found)


class _Noise:
    kind = "synthetic"

    def __init__(self, films):
        self.films = films

    def __len__(self):
        return len(self.films)

    def film(self, index):
        return self.films[index]


def _student(objective) -> dict:
    """Random values of about 0.2: fresh ones give features so alike that KoLeo magnifies rounding."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), shapes)


@functools.cache
def _start(devices: int, fsdp: int, local_crops: int):
    """(the compiled step, what makes the state before it, the batches) on a mesh."""
    config = multicxr.get_config(f"{TINY},mesh.fsdp={fsdp},views.local_crops={local_crops}")
    train.check(config, devices)
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp)
    constants = train.step_of(config, 20, 64, mesh)
    student = _student(constants.objective)
    batches = [
        sharding.to_devices({name: batch[name] for name in ("images", "masks")}, mesh)
        for batch in _batches(config)
    ]

    def fresh(step: int = 0) -> train.TrainState:
        state = train.init_state(constants, mesh, student)
        return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))

    step = train.jit_step(constants, fresh(), mesh).lower(fresh(), batches[0]).compile()
    return step, fresh, batches


@functools.cache
def _walk(devices: int, fsdp: int, local_crops: int):
    """(metrics of every step, parameters before, and of student and teacher after) on a mesh."""
    step, fresh, batches = _start(devices, fsdp, local_crops)
    state, metrics = fresh(), []
    before = jax.tree.map(np.asarray, trees.flatten(state.student))
    for batch in batches:
        state, found = step(state, batch)
        metrics.append({name: float(value) for name, value in found.items()})
    prototypes = state.student["dino_head"]["last_layer"]["weight_v"]
    assert prototypes.addressable_shards[0].data.shape == (32 // fsdp, 16)
    assert int(state.step) == STEPS
    after = {"student": state.student, "teacher": state.teacher}
    return metrics, before, jax.tree.map(np.asarray, trees.flatten(after))


MESHES = [pytest.param(8, 2, 0, id="4x2")] + [
    pytest.param(8, fsdp, 1, id=f"{8 // fsdp}x{fsdp}, local crops", marks=pytest.mark.slow)
    for fsdp in (1, 2, 4)
]


@pytest.mark.parametrize("devices, fsdp, local", MESHES)
def test_every_mesh_walks_the_same_trajectory_as_one_device(devices, fsdp, local):
    """Losses and norms 1e-5 relative over three steps, parameters 1e-5 of their largest: float32."""
    (metrics, _, after), (expected, _, wanted_after) = _walk(devices, fsdp, local), _walk(1, 1, local)
    for step, (row, wanted) in enumerate(zip(metrics, expected, strict=True)):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            tolerance = dict(atol=0.1) if name == "agreement" else dict(rtol=1e-5)  # a share of rows
            np.testing.assert_allclose(row[name], value, **tolerance, err_msg=f"{name}, step {step}")
    assert after.keys() == wanted_after.keys()
    for name, value in wanted_after.items():
        tolerance = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(after[name], value, atol=tolerance, rtol=0, err_msg=name)


def test_three_steps_move_every_parameter_of_student_and_teacher():
    """The test above could not fail on a run that stands still."""
    metrics, before, after = _walk(1, 1, 0)
    losses = [row["loss"] for row in metrics]
    assert len(set(losses)) == STEPS and np.isfinite(losses).all()
    for name, value in before.items():
        student, teacher = (np.abs(after[f"{s}/{name}"] - value).max() for s in ("student", "teacher"))
        assert student > teacher > 0, name


def test_a_batch_that_comes_again_at_another_step_is_seen_in_other_views():
    step, fresh, batches = _start(1, 1, 0)
    losses = [float(step(fresh(at), batches[0])[1]["loss"]) for at in (0, 0, 1)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert abs(losses[2] - losses[0]) > 1e-4 * losses[0]


# --- memory on a CPU ------------------------------------------------------------------------------

HELD = """
import ctypes, resource, sys
from raddino_jax import sharding
if sys.argv[1] == "keep":
    sharding.keep_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, faults = 2**28, []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is told to keep memory")
def test_memory_that_was_freed_is_had_again_without_page_faults():
    """A block of 256 MiB has 65,536 pages of 4 KiB; where the system gives huge ones, still 128."""
    lone = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC")}
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", HELD, word], env=lone, text=True).split()[-1])
        for word in ("keep", "return")
    )
    assert kept < 64 <= returned, (kept, returned)
