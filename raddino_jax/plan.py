"""Does a config fit, and what would it cost? Compiles the real training step ahead of time and reads the compiler.

    python -m raddino_jax.plan --config=configs/multicxr.py --topology=v5e:4x8 [--sweep]
    python -m raddino_jax.plan --config=configs/report.py --topology=v5p:4x4x4

Of pre-training and of report generation; the latter's language model and encoder need no weights for it, only sizes.
With --topology no such hardware is needed (extra `tpu`); without it the devices at hand are used. A table goes to
stdout and, as its last line, one JSON object; progress goes to stderr.
"""

import contextlib
import copy
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

# libtpu is only asked for a description of chips that are not there: no metadata server, no lock.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import topologies
from ml_collections import config_flags

from raddino_jax import encoders, flops, logs, sharding, starts, train
from raddino_jax import params as trees
from raddino_jax.conversion.llama import read_sizes
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import tune
from raddino_jax.evals.patches import Eye
from raddino_jax.evals.writer import Writer

GIB = 2**30
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1, "s64": 8, "u64": 8}

POLICIES = ("full", "dots", "none")  # of remat, what needs least first

# Which knob helps most when a step does not fit, first what costs least.
KNOBS = {
    "pretrain": [
        (lambda c, remat, chips: remat == "none", "model.remat=dots"),
        (lambda c, remat, chips: remat == "dots", "model.remat=full"),
        (lambda c, remat, chips: c.batch_size > c.accumulate * chips * c.group_size, "more accumulate or more chips"),
        (lambda c, remat, chips: c.mesh.fsdp == 1, "mesh.fsdp over more chips"),
        (lambda c, remat, chips: True, "more chips"),
    ],
    "report": [
        (lambda c, remat, chips: c.mesh.fsdp > 0, "mesh.fsdp=0, all chips"),
        (lambda c, remat, chips: remat == "none", "remat=True"),
        (lambda c, remat, chips: not c.lora, "more accumulate or more chips; else lora=64, which is another recipe"),
        (lambda c, remat, chips: True, "more accumulate or more chips"),
    ],
}


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a named topology, which need not exist, or those at hand. Raises ConfigError for unknown ones."""
    if not topology:
        return jax.devices()
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise train.ConfigError("--topology needs libtpu, which describes chips: pip install -e '.[tpu]'") from None
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise train.ConfigError(f"--topology={topology}: no such TPU, or none that libtpu knows ({said})") from None


def lower(config, devices) -> tuple[jax.stages.Lowered, train.Step, int]:
    """(the training step of a config lowered for devices, its constants, bytes of arguments per chip); from shapes."""
    train.check(config, len(devices))
    mesh = sharding.make_mesh(devices, config.mesh.fsdp)
    constants = train.step_of(config, config.steps, 10**6, mesh)
    state = jax.eval_shape(lambda: train.fresh_state(constants, jax.random.key(0)))
    state = jax.tree.map(_placed, state, sharding.shardings(state, mesh))
    size, patches = config.data.image_size, (config.views.global_size // config.model.patch_size) ** 2
    places = sharding.batch_sharding(mesh)
    batch = {
        "images": jax.ShapeDtypeStruct((config.batch_size, size, size), np.uint8, sharding=places),
        "masks": jax.ShapeDtypeStruct((config.batch_size, 2, -(-patches // 8)), np.uint8, sharding=places),
    }
    with jax.set_mesh(mesh):
        return train.jit_step(constants, state, mesh).lower(state, batch), constants, _bytes_per_chip((state, batch))


def lower_report(config, devices) -> tuple[jax.stages.Lowered, tune.Tune, int]:
    """The same of the step that tunes the writer of reports, on texts of `config.length` tokens.

    Raises encoders.WeightsError.
    """
    if config.batch_size % (config.accumulate * len(devices)):
        raise train.ConfigError(
            f"batch_size={config.batch_size} must be a multiple of accumulate={config.accumulate} times the "
            f"{len(devices)} chips"
        )
    mesh = sharding.make_mesh(devices, config.mesh.fsdp or len(devices))
    constants = _tuning(config, devices[0].platform)
    params = jax.eval_shape(partial(constants.writer.init, channels=constants.encode.shape[1]), jax.random.key(0))
    state, frozen = jax.eval_shape(constants.fresh, params), jax.eval_shape(lambda: constants.encode.encoder.params)
    state, frozen = (jax.tree.map(_placed, tree, sharding.shardings(tree, mesh)) for tree in (state, frozen))
    n, size, places = config.batch_size, constants.encode.encoder.image_size, sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct((n, config.length), np.int32, sharding=places) for name in ("tokens", "labels")}
    batch["mask"] = jax.ShapeDtypeStruct((n, config.length), bool, sharding=places)
    batch["images"] = jax.ShapeDtypeStruct((n, size, size), np.uint8, sharding=places)
    with jax.set_mesh(mesh):
        lowered = tune.jit_step(constants, state, frozen, mesh).lower(state, frozen, batch)
    return lowered, constants, _bytes_per_chip((state, frozen, batch))


def _tuning(config, platform: str) -> tune.Tune:
    """Constants of a step: the sizes of `config.llm`, or `llm_sizes` where it names no folder; no weights are read."""
    folder = Path(config.llm) / "config.json"
    sizes = read_sizes(folder) if config.llm else config.llm_sizes.to_dict()
    writer = Writer.of(sizes, dtype=config.compute_dtype, remat=config.remat, lora=config.lora)
    changed = config.copy_and_resolve_references()
    changed.weights = "random"
    eye = _for_platform(Eye.open(changed, config.compute_dtype), platform)
    return tune.Tune(
        writer, eye, config.lr, config.warmup, tuple(config.betas), config.weight_decay, config.clip,
        config.steps or 10**4, config.accumulate,
    )  # fmt: skip


def _for_platform(eye: Eye, platform: str) -> Eye:
    """The same with the attention that is fast there: an encoder is opened for the devices at hand."""
    encoder = copy.copy(eye.encoder)
    encoder.network = encoders.computing(encoder.network, platform, np.dtype(encoder.dtype))
    return dataclasses.replace(eye, encoder=encoder)


def _placed(leaf, place):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _bytes_per_chip(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan(config, topology: str) -> tuple[dict, str | None]:
    """(the row of a config on a topology, the compiled program's text, None where the compiler refused it for memory).

    Raises ConfigError for tasks without a plan.
    """
    if config.task not in FIELDS:
        raise train.ConfigError(f"task={config.task!r} has no plan; {' and '.join(FIELDS)} have")
    devices = devices_of(topology)
    began = time.perf_counter()
    lowered, constants, arguments = (lower_report if config.task == "report" else lower)(config, devices)
    try:
        compiled = lowered.compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # the TPU compiler refuses what does not fit
        text, memory = None, Refused.of(error, arguments)
    seconds = time.perf_counter() - began
    fields = FIELDS[config.task](config, len(devices), constants)
    return _row(config, topology, devices, fields, memory, text, seconds), text


@dataclasses.dataclass(frozen=True)
class Refused:
    """What is left of a memory analysis when the compiler gave up, in bytes; what comes out lies where it went in."""

    temp_size_in_bytes: float
    argument_size_in_bytes: float
    output_size_in_bytes: float = 0.0
    alias_size_in_bytes: float = 0.0

    @classmethod
    def of(cls, error: Exception, arguments: float) -> "Refused":
        """From the compiler's message, which tells the temporaries it asked for; any other error is raised again."""
        asked = re.search(r"temporaries \(([\d.]+)([MG])\)", str(error))
        if "Ran out of memory" not in str(error) or asked is None:
            raise error
        return cls(float(asked[1]) * (GIB if asked[2] == "G" else 2**20), arguments)


def _of_pretraining(config, chips: int, constants: train.Step) -> dict:
    """The fields of a row that say what is computed."""
    views, objective = constants.views, constants.objective
    per_image = flops.step(objective, views.global_size, views.local_size, views.local_crops)
    student = jax.eval_shape(objective.init, jax.random.key(0))
    return dict(
        images_per_chip=config.batch_size / chips, image_size=views.global_size, prototypes=config.head.prototypes,
        parameters=trees.count(student), remat=objective.backbone.remat, logits_budget=objective.logits_budget,
        fsdp=config.mesh.fsdp, flops_per_step=per_image * config.batch_size,
    )  # fmt: skip


def _of_report(config, chips: int, constants: tune.Tune) -> dict:
    """The same of tuning: `parameters` are those of the writer, `trained` those that have moments."""
    patches, channels = constants.encode.shape
    params = jax.eval_shape(partial(constants.writer.init, channels=channels), jax.random.key(0))
    trained, _ = constants.writer.split(params)
    per_text = flops.tuning(constants.writer, config.length, patches, channels) + _encoding(constants.encode)
    return dict(
        texts_per_chip=config.batch_size / chips, accumulate=config.accumulate, length=config.length,
        patches=patches, encoder=config.encoder, lora=config.lora, parameters=trees.count(params),
        trained=trees.count(trained), remat="full" if config.remat else "none", fsdp=config.mesh.fsdp or chips,
        flops_per_step=per_text * config.batch_size,
    )  # fmt: skip


def _encoding(eye) -> float:
    """FLOPs of a film's patches; counted with an attention that has no loops."""
    size, params = eye.encoder.image_size, jax.eval_shape(lambda: eye.encoder.params)
    return flops.traced(_for_platform(eye, "xla"), params, jax.ShapeDtypeStruct((1, size, size), np.uint8))


FIELDS = {"pretrain": _of_pretraining, "report": _of_report}


def _row(config, topology, devices, fields, memory, text, seconds) -> dict:
    chip, work = flops.chip(devices[0]), fields["flops_per_step"]
    ideal = None if chip is None else work / (chip.peak * 1e12 * len(devices))
    peak = _reserved(memory) / GIB
    fits = None if chip is None else bool(peak <= chip.memory)
    return dict(
        topology=topology or f"local {devices[0].device_kind} x {len(devices)}", chips=len(devices),
        batch_size=config.batch_size, **fields,
        ideal_step_seconds=ideal, half_peak_step_seconds=ideal and 2 * ideal,
        peak_hbm_gib=peak, chip_hbm_gib=chip and chip.memory,
        argument_gib=memory.argument_size_in_bytes / GIB, temporary_gib=memory.temp_size_in_bytes / GIB,
        output_gib=memory.output_size_in_bytes / GIB, collectives=text and collectives(text), compile_seconds=seconds,
        fits=fits, verdict=_verdict(config, fields["remat"], len(devices), peak, chip),
    )  # fmt: skip


def _reserved(memory) -> float:
    """Bytes a chip must have: what goes in, what comes out of it anew, and the arena of temporaries between."""
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return total - memory.alias_size_in_bytes


def _verdict(config, remat: str, chips: int, peak: float, chip) -> str:
    if chip is None:
        return f"needs {peak:.1f} GiB; what this device has is not known"
    if peak <= chip.memory:
        return f"fits: {_gib(peak)} of {chip.memory} GiB per chip"
    knob = next(text for applies, text in KNOBS[config.task] if applies(config, remat, chips))
    return f"does not fit by {peak - chip.memory:.1f} GiB per chip; first try {knob}"


def _gib(amount: float) -> str:
    return f"{amount:.1f}" if amount >= 1 else f"{amount:.3f}"


def collectives(text: str) -> dict[str, dict]:
    """{kind: {"count", "bytes"}} of a compiled program: bytes of results, per chip and execution.

    One inside a loop is counted once, and so is one that the compiler shows in several pieces of its schedule.
    """
    found: dict[str, dict] = {}
    seen = set()
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        channel = re.search(r"channel_id=\d+", line)
        hit = re.search(rf"= (\(?[^=]*?\)?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if hit and not (channel and channel[0] in seen):
            seen.add(channel and channel[0])
            row = found.setdefault(hit[2], {"count": 0, "bytes": 0})
            row["count"] += 1
            row["bytes"] += sum(map(_size, re.findall(r"(\w+)\[([\d,]*)\]", hit[1])))
    return found


def _size(shape: tuple[str, str]) -> int:
    kind, dims = shape
    return BYTES.get(kind, 4) * int(np.prod([int(d) for d in dims.split(",") if d]))


def sweep(config, devices: int) -> Iterator:
    """Copies of a config over images per chip (half, as they are, twice), remat policies and logit budgets.

    What needs least comes first. The batch changes with the images per chip; sizes that its groups forbid are left out.
    """
    batches = [config.batch_size // 2, config.batch_size, config.batch_size * 2]
    for batch, remat, budget in itertools.product(batches, POLICIES, (2**24, 2**26, 2**28)):
        changed = config.copy_and_resolve_references()
        changed.batch_size, changed.model.remat, changed.loss.logits_budget = batch, remat, budget
        with contextlib.suppress(train.ConfigError):
            train.check(changed, devices)
            yield changed


def hopeless(config, devices: int, rows: list[dict]) -> bool:
    """Whether some row that does not fit has no more images per chip, kept arrays and logits than this config."""
    mine = (config.batch_size / devices, POLICIES.index(config.model.remat), config.loss.logits_budget)
    return any(
        row["fits"] is False
        and row["images_per_chip"] <= mine[0] and POLICIES.index(row["remat"]) <= mine[1]
        and row["logits_budget"] <= mine[2]
        for row in rows
    )  # fmt: skip


def frontier(rows: list[dict]) -> list[dict]:
    """Of each number of images per chip and remat policy the row that needs least memory, the leanest first."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (row["images_per_chip"], row["remat"])
        if key not in best or row["peak_hbm_gib"] < best[key]["peak_hbm_gib"]:
            best[key] = row
    return sorted(best.values(), key=lambda row: row["peak_hbm_gib"])


def show_frontier(rows: list[dict], write: Callable[[str], None] = print) -> None:
    """The frontier of a sweep as a table, what needs least first."""
    write("images per chip  remat  logits budget   GiB per chip  verdict")
    for row in frontier(rows):
        write(
            f"{row['images_per_chip']:15g}  {row['remat']:5s}  {row['logits_budget']:13d}  "
            f"{_gib(row['peak_hbm_gib']):>13s}  {row['verdict']}"
        )


def show(row: dict, write: Callable[[str], None] = print) -> None:
    """The row as a table a person reads."""
    for name, value in row.items():
        shown = f"{value:,.3f}" if isinstance(value, float) and value < 1e6 else f"{value}"
        if name == "flops_per_step":
            shown = f"{value / 1e12:,.1f} TFLOP"
        if value is None:
            shown = "not known"
        elif name == "collectives":
            shown = ", ".join(f"{v['count']} {k} ({v['bytes'] / 2**20:,.1f} MiB)" for k, v in value.items()) or "none"
        write(f"{name:24s} {shown}")


def run(config, topology: str, swept: bool) -> None:
    """Plan one config, or its sweep; the table and, last, the JSON object go to stdout."""
    if swept and config.task != "pretrain":
        raise train.ConfigError("--sweep varies pre-training alone")
    devices, where = len(devices_of(topology)), topology or "the devices at hand"
    configs = list(sweep(config, devices)) if swept else [config]
    rows, began = [], time.perf_counter()
    for done, config in enumerate(configs):
        if swept and hopeless(config, devices, rows):
            continue
        spent = time.perf_counter() - began
        left = f"; about {logs.duration(spent / done * (len(configs) - done))} left, at most" if done else ""
        logs.say(f"compiling {done + 1} of {len(configs)} for {where}{left} ...")
        rows.append(plan(config, topology)[0])
        show(rows[-1])
        print(flush=True)
    if swept:
        show_frontier(rows)
        if len(rows) < len(configs):
            print(f"{len(configs) - len(rows)} left out: each needs more than a row that does not fit")
    print(json.dumps({"sweep": rows} if swept else rows[0]))


def cli() -> None:
    """Console entry: a config that cannot run is one message and exit code 2."""
    config = config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/multicxr.py.")
    topology = flags.DEFINE_string("topology", "", "A TPU topology such as v5e:4x8; empty: the devices at hand.")
    swept = flags.DEFINE_bool("sweep", False, "Compile images per chip x remat x logit budgets, print the frontier.")
    try:
        logging.set_verbosity(logging.ERROR)
        app.run(lambda _: run(config.value, topology.value, swept.value), flags_parser=starts.parse)
    except (train.ConfigError, DataError, encoders.WeightsError) as error:
        logs.say(f"raddino_jax: {error}")
        sys.exit(2)


if __name__ == "__main__":
    cli()
