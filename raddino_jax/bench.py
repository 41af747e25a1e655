"""How fast is it here? Times a part of a config on the devices at hand.

    python -m raddino_jax.bench --config=configs/multicxr.py --what=step|augment|encode|data [--data=real]
    python -m raddino_jax.bench --config=configs/multicxr.py:vits14_224 --what=step --against=torch

Images are a seeded uint8 batch already on the device; --data=real (always so for --what=data) reads the config's
sources as training does, and --what=data compares ways to store their films. --against=torch takes turns with the same
work in PyTorch, in another process with as many threads (PJRT_NPROC sets how many). A table goes to stdout and, as its
last line, one JSON object; progress to stderr.
"""

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from raddino_jax import augment, flops, logs, masking, rival, sharding, starts, train
from raddino_jax import params as trees
from raddino_jax.conversion import files, formats, huggingface
from raddino_jax.data import encodings, pipeline

GIB = 2**30
HORIZON = 1000  # steps of the run whose schedules are used


class BenchError(RuntimeError):
    """What cannot be timed, and why."""


@dataclass
class Work:
    """Something to time. turn() does it once and returns (a value to show, seconds waited for data)."""

    turn: Callable[[], tuple[float, float]]
    images: int
    flops: float  # per image


# --- what can be timed ----------------------------------------------------------------------------------


def step(config, mesh, real: bool) -> Work:
    """The whole training step: views, objective, gradient, AdamW, teacher."""
    constants = train.step_of(config, HORIZON, HORIZON * config.batch_size, mesh)
    state = train.init_state(constants, mesh)
    run = train.jit_step(constants, state, mesh)
    feed = _real(config, mesh) if real else itertools.repeat(sharding.to_devices(batch(config), mesh))
    held = {"state": state}  # the step donates it

    def turn():
        began = time.perf_counter()
        given = next(feed)
        waited = time.perf_counter() - began
        held["state"], metrics = run(held["state"], given)
        jax.block_until_ready(held["state"])
        return float(metrics["loss"]), waited

    return Work(turn, config.batch_size, _step_flops(constants))


def views_and_update(config, mesh) -> tuple[Work, dict, train.Step]:
    """The step from given views on, with what a rival needs to do the same: (work, arrays, constants)."""
    constants = train.step_of(config, HORIZON, HORIZON * config.batch_size, mesh)
    state = train.init_state(constants, mesh)
    given = batch(config)
    views = jax.jit(lambda x: augment.views(
        jax.random.key(config.seed), x, constants.views, jnp.arange(len(x)), constants.mean, constants.std
    ))(given["images"])
    patches = _patches(config)
    masks = np.unpackbits(given["masks"], axis=-1, count=patches).astype(bool)
    arrays = {name: np.asarray(view) for name, view in views.items()} | {"masks": masks, "student": state.student}
    arrays = jax.tree.map(np.array, arrays)  # copies: the step donates the state
    key = jax.random.key(config.seed)
    run = jax.jit(lambda s, v, m: train.update(s, v, m, key, constants), donate_argnums=0)
    held = {"state": state}

    def turn():
        held["state"], metrics = run(held["state"], views, masks)
        jax.block_until_ready(held["state"])
        return float(metrics["loss"]), 0.0

    return Work(turn, config.batch_size, _step_flops(constants)), arrays, constants


def encode(config, mesh, images: int) -> tuple[Work, dict]:
    """Forward passes of the backbone: `images` normalised films -> class and patch features."""
    platform = mesh.devices.flat[0].platform
    backbone, size = train.backbone_of(config, platform), config.views.global_size
    films = np.random.default_rng(config.seed).normal(size=(images, size, size, 1)).astype(np.float32)
    params = jax.jit(backbone.init)(jax.random.key(config.seed), films[:1])
    held = jax.device_put(films, sharding.batch_sharding(mesh)) if images % mesh.size == 0 else films

    @jax.jit
    def run(params, films):
        out = backbone.apply(params, films)
        return out["cls"], out["patches"]

    def turn():
        cls, _ = jax.block_until_ready(run(params, held))
        return float(jnp.abs(cls.astype(jnp.float32)).sum()), 0.0

    crop = flops.vit(backbone, size)
    arrays = {"images": films, "student": {"backbone": params["params"]}}
    return Work(turn, images, crop.blocks + crop.embedding), arrays


def views(config, mesh) -> Work:
    """The augmentation alone."""
    constants = train.step_of(config, HORIZON, HORIZON * config.batch_size, mesh)
    images = sharding.to_devices(batch(config), mesh)["images"]
    dtype = jnp.dtype(config.compute_dtype)
    slots = jnp.arange(config.batch_size)

    @jax.jit
    def run(key, x):
        return augment.views(key, x, constants.views, slots, constants.mean, constants.std, dtype)

    keys = (jax.random.key(i) for i in itertools.count())

    def turn():
        made = jax.block_until_ready(run(next(keys), images))
        return float(made["global"][0, 0, 0, 0, 0]), 0.0

    return Work(turn, config.batch_size, 0.0)


def data(config) -> Work:
    """Reading and batching on this host, no device."""
    feed = _host_batches(config)
    return Work(lambda: (float(next(feed)["images"][0, 0, 0]), 0.0), config.batch_size, 0.0)


def batch(config) -> dict[str, np.ndarray]:
    """A seeded batch as the pipeline would hand it over: uint8 noise and the config's masks."""
    rng, side = np.random.default_rng(config.seed), config.data.image_size
    groups = [
        masking.group_masks(
            config.seed, 0, group, crops=2 * config.group_size, image_size=config.views.global_size,
            patch_size=config.model.patch_size, probability=config.masks.probability, ratio=tuple(config.masks.ratio),
        )
        for group in range(config.batch_size // config.group_size)
    ]
    masks = np.concatenate(groups).reshape(config.batch_size, 2, -1)
    images = rng.integers(0, 256, (config.batch_size, side, side), dtype=np.uint8)
    return {"images": images, "masks": np.packbits(masks, axis=-1)}


def _host_batches(config) -> Iterator[dict]:
    spec = pipeline.MaskSpec(
        config.group_size, config.views.global_size, config.model.patch_size, config.masks.probability,
        tuple(config.masks.ratio),
    )
    return iter(pipeline.batches(
        config.data, rows=pipeline.Rows(0, config.batch_size, config.batch_size), steps=10**9, start=0,
        seed=config.seed, sources=pipeline.open_sources(config.data), masks=spec,
    ))


def _real(config, mesh) -> Iterator[dict]:
    for given in _host_batches(config):
        yield sharding.to_devices({k: given[k] for k in ("images", "masks")}, mesh)


def _patches(config) -> int:
    return (config.views.global_size // config.model.patch_size) ** 2


def _step_flops(constants: train.Step) -> float:
    v = constants.views
    return flops.step(constants.objective, v.global_size, v.local_size, v.local_crops)


# --- timing ---------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds of each counted turn, seconds waited for data in them, the first value (step 0's loss)."""

    seconds: list[float]
    waited: float
    first: float
    peak_gib: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(rivals: dict[str, Callable[[], dict]], count: int, warm_up: int) -> dict[str, Timing]:
    """Every rival does one turn, then the next: noise of the machine meets all alike.

    A rival returns {"value", "seconds", "waited", "peak_memory_gib"}. The first `warm_up` rounds are not counted.
    """
    found: dict[str, list[dict]] = {name: [] for name in rivals}
    for number in range(warm_up + count):
        for name, turn in rivals.items():
            found[name].append(turn())
            label = "warm-up" if number < warm_up else f"{number - warm_up + 1} of {count}"
            logs.say(f"{name}: {label}, {found[name][-1]['seconds']:.4f} s")
    return {
        name: Timing(
            [t["seconds"] for t in turns[warm_up:]], sum(t["waited"] for t in turns[warm_up:]), turns[0]["value"],
            max(t["peak_memory_gib"] for t in turns[warm_up:]),
        )
        for name, turns in found.items()
    }


def ours(work: Work) -> Callable[[], dict]:
    """A `Work` as a rival of `take_turns`."""

    def turn():
        began = time.perf_counter()
        value, waited = work.turn()
        seconds = time.perf_counter() - began
        peak = peak_memory()
        rival.forget_peak()
        return {"value": value, "seconds": seconds, "waited": waited, "peak_memory_gib": peak}

    return turn


def peak_memory() -> float:
    """GiB: the fullest device's own count where it keeps one, else the most this process held in the last turn."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] / GIB for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else rival.peak_memory()


def threads() -> int:
    """Threads that XLA computes with on a CPU."""
    return int(os.environ.get("PJRT_NPROC") or len(os.sched_getaffinity(0)))


# --- PyTorch beside us --------------------------------------------------------------------------------------


@contextlib.contextmanager
def torch_rival(config, arrays: dict, requests: Callable[[], dict]):
    """`rival` in a process of its own, as a turn of `take_turns`.

    arrays: as `views_and_update` and `encode` return them. requests: what to ask of the next turn.
    Raises BenchError where torch or transformers are missing.
    """
    for name in ("torch", "transformers"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise BenchError(f"--against=torch needs {name}: pip install -e '.[test]'") from None
    with tempfile.TemporaryDirectory() as folder:
        _write_rival(config, arrays, Path(folder))
        command = [sys.executable, "-m", "raddino_jax.rival", folder]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            _answer(child)

            def turn():
                child.stdin.write(json.dumps(requests()) + "\n")
                child.stdin.flush()
                return _answer(child) | {"waited": 0.0}

            yield turn
        finally:
            child.stdin.close()
            child.wait(timeout=60)


def _answer(child) -> dict:
    line = child.stdout.readline()
    if not line:
        raise BenchError(f"the PyTorch process ended (exit code {child.wait()}); its message stands above")
    return json.loads(line)


def _write_rival(config, arrays: dict, folder: Path) -> None:
    """Everything the rival starts from: a Hugging Face folder, arrays.npz, settings.json."""
    backbone, optim = train.backbone_of(config), config.optim
    (folder / "backbone").mkdir()
    names = ("width", "depth", "heads", "ffn", "patch_size", "image_size", "registers")
    fields = {name: getattr(backbone, name) for name in names}
    (folder / "backbone" / "config.json").write_text(json.dumps(huggingface.write_config(fields, "float32")))
    student = jax.tree.map(np.asarray, arrays["student"])
    weights = formats.write("hf_dinov2", trees.flatten(student["backbone"]), "the student")
    files.write(folder / "backbone" / "model.safetensors", weights)
    given = {name: array for name, array in arrays.items() if name != "student"}
    if "dino_head" in student:
        head = formats.write("dino_head", trees.flatten(student["dino_head"]), "the student's head")
        given |= {f"head/{name}": array for name, array in head.items()}
    np.savez(folder / "arrays.npz", **given)
    settings = dict(
        threads=threads(), head_layers=config.head.layers, student_temperature=config.loss.student_temperature,
        sinkhorn_iterations=config.loss.sinkhorn_iterations, dino_weight=config.loss.dino, ibot_weight=config.loss.ibot,
        koleo_weight=config.loss.koleo, koleo_group=config.koleo_group, clip=optim.clip, layer_decay=optim.layer_decay,
        patch_embed_factor=optim.patch_embed_factor, betas=tuple(optim.betas), eps=optim.eps,
    )
    (folder / "settings.json").write_text(json.dumps(settings))


def fair(config):
    """The config as both sides can run it: float32, no drop path, Hugging Face's resize of position embeddings.

    LayerScale starts at 1: at 1e-5 random weights give all films the same features up to rounding, and KoLeo is the
    logarithm of their distances.
    """
    config = config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    config.model.update(drop_path=0.0, layerscale=1.0, offset=0.0, antialias=False, remat="none")
    problems = [
        text for bad, text in [
            (config.head.separate, "head.separate"), (config.loss.centring != "sinkhorn", "loss.centring"),
            (config.model.registers, "model.registers"), (not config.loss.ibot, "loss.ibot=0"),
            (not config.views.local_crops, "views.local_crops=0"),
        ] if bad
    ]
    if problems:
        raise BenchError(f"--against=torch knows the default objective only; this config sets {', '.join(problems)}")
    return config


def against_torch(config, what: str, images: int, count: int, warm_up: int) -> tuple[dict, dict[str, Timing]]:
    """(row, timings) of our work and the same in PyTorch. Raises BenchError where ours would run on an accelerator."""
    platform = jax.devices()[0].platform
    if platform != "cpu":
        raise BenchError(f"--against=torch compares on the CPU, and jax computes on {platform}: set JAX_PLATFORMS=cpu")
    config = fair(config)
    mesh = sharding.make_mesh(jax.devices()[:1], 1)
    with jax.set_mesh(mesh):
        if what == "encode":
            work, arrays = encode(config, mesh, images)
            requests = dict
        else:
            work, arrays, constants = views_and_update(config, mesh)
            index = itertools.count()

            def requests():
                return {name: float(value) for name, value in constants.schedules.at(next(index)).items()}

        with torch_rival(config, arrays, requests) as torch:
            timings = take_turns({"ours": ours(work), "torch": torch}, count, warm_up)
    mine, theirs = timings["ours"], timings["torch"]
    difference = abs(mine.first - theirs.first) / max(abs(theirs.first), 1e-12)
    if difference > 1e-4:
        raise BenchError(
            f"the two sides differ: {mine.first} here, {theirs.first} in PyTorch; timing them means nothing"
        )
    row = _row(config, what, mesh, work, mine) | dict(
        against="torch", ratio=theirs.median / mine.median, torch_step_seconds=theirs.median,
        torch_peak_memory_gib=theirs.peak_gib, first_value=mine.first, torch_first_value=theirs.first,
    )
    row["versions"] |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return row, timings


# --- the row ----------------------------------------------------------------------------------------------


def alone(config, what: str, images: int, real: bool, count: int, warm_up: int) -> tuple[dict, dict[str, Timing]]:
    """(row, timings) of one kind of work on all devices at hand."""
    devices = jax.devices()
    mesh = sharding.make_mesh(devices, config.mesh.fsdp)
    make = {
        "step": lambda: step(config, mesh, real), "encode": lambda: encode(config, mesh, images)[0],
        "augment": lambda: views(config, mesh), "data": lambda: data(config),
    }
    with jax.set_mesh(mesh):
        if what in ("step", "augment"):
            train.check(config, len(devices))
        work = make[what]()
        timings = take_turns({"ours": ours(work)}, count, warm_up)
    row = _row(config, what, mesh, work, timings["ours"])
    if what == "data":
        logs.say("the same films in other encodings ...")
        row["encodings"] = encodings.compare(config.data)
    return row | {"data": "real" if real or what == "data" else "cached"}, timings


def _row(config, what, mesh, work: Work, timing: Timing) -> dict:
    device = mesh.devices.flat[0]
    chip, rate = flops.chip(device), work.images / timing.median
    measured = chip is not None and work.flops and what != "data"
    return dict(
        what=what, device=device.device_kind, devices=mesh.size,
        batch_size=work.images, image_size=config.views.global_size, dtype=config.compute_dtype,
        drop_path=config.model.drop_path, remat=train.remat_of(config, mesh),
        threads=threads() if device.platform == "cpu" else None, images_per_second=rate,
        step_seconds=timing.median, step_seconds_range=[min(timing.seconds), max(timing.seconds)],
        count=len(timing.seconds), mfu=rate * work.flops / (chip.peak * 1e12 * mesh.size) if measured else None,
        flops_per_image=work.flops or None, peak_memory_gib=timing.peak_gib,
        data_wait_fraction=timing.waited / sum(timing.seconds), first_value=timing.first,
        versions={name: importlib.metadata.version(name) for name in ("raddino_jax", "jax", "jaxlib", "flax")},
        date=datetime.date.today().isoformat(),
    )


def show(row: dict, timings: dict[str, Timing]) -> None:
    """Who took how long, and the row."""
    for name, timing in timings.items():
        low, high = min(timing.seconds), max(timing.seconds)
        print(f"{name:8s} median {timing.median:.4f} s  (from {low:.4f} to {high:.4f}, {len(timing.seconds)} times)")
    if "encodings" in row:
        print(encodings.show(row["encodings"]))
    for name, value in row.items():
        print(f"{name:22s} {value:,.4g}" if isinstance(value, float) else f"{name:22s} {value}")
    print(json.dumps(row))


def run(config, what: str, against: str, images: int, real: bool, count: int, warm_up: int, profile: str) -> None:
    """Time it and print; profile: a folder for a trace of one more turn's worth of everything."""
    sharding.keep_memory()
    images = images or (2 if jax.devices()[0].platform == "cpu" else 40 * len(jax.devices()))
    trace = jax.profiler.trace(profile) if profile else contextlib.nullcontext()
    with trace:
        if against:
            show(*against_torch(config, what, images, count, warm_up))
        else:
            show(*alone(config, what, images, real, count, warm_up))


def cli() -> None:
    """Console entry: what cannot be timed is one message and exit code 2."""
    config = config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/multicxr.py.")
    what = flags.DEFINE_enum("what", "step", ["step", "data", "augment", "encode"], "What to time.")
    against = flags.DEFINE_enum("against", "", ["", "torch"], "Take turns with the same work in PyTorch.")
    images = flags.DEFINE_integer("images", 0, "Films per call of encode; 0: 2 on a CPU, 40 per accelerator.")
    source = flags.DEFINE_enum("data", "cached", ["cached", "real"], "A cached batch, or the config's sources.")
    count = flags.DEFINE_integer("count", 10, "Turns that count.", lower_bound=1)
    warm_up = flags.DEFINE_integer("warm_up", 2, "Turns before them; the first one compiles.", lower_bound=1)
    profile = flags.DEFINE_string("profile", "", "Write a trace for TensorBoard or Perfetto into this folder.")

    def begin(_):
        if against.value and what.value not in ("step", "encode"):
            raise BenchError(f"--against=torch times step and encode, not {what.value}")
        real = source.value == "real"
        run(config.value, what.value, against.value, images.value, real, count.value, warm_up.value, profile.value)

    try:
        logging.set_verbosity(logging.ERROR)
        app.run(begin, flags_parser=starts.parse)
    except (BenchError, train.ConfigError, pipeline.DataError) as error:
        logs.say(f"raddino_jax: {error}")
        sys.exit(2)


if __name__ == "__main__":
    cli()
