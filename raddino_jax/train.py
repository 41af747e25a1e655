"""Pre-training: what a config builds, the training state, one step, and the run.

Reference: arXiv 2401.10815, section 3.1 and E.1; the order of one iteration is DINOv2's `train/train.py`.
"""

import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from raddino_jax import augment, checkpoints, encoders, flops, hosts, logs, loop, masking, optim, sharding, watch
from raddino_jax import params as trees
from raddino_jax.data import pipeline
from raddino_jax.models.heads import DINOHead
from raddino_jax.models.ops import products
from raddino_jax.models.vit import FEATURES, FFN, REMAT, VARIANTS, ViT, resize_pos_embed
from raddino_jax.objective import Objective

Array = jax.Array
Beat = Callable[[int, str], None]


AUTO = "auto"  # of config.model.remat
MARGIN = 0.8  # of a chip's memory that an estimate may fill: compilers need room to move
SMALL = 64  # GiB of a chip below which its chunks of logits are small


class ConfigError(ValueError):
    """A config that cannot run; the message lists every problem with its mend."""


# --- from a config to the parts of a step -------------------------------------------------------------


def backbone_of(config, platform: str = "cpu", remat: str = "none") -> ViT:
    """The ViT of `config.model`, computing in `config.compute_dtype`; remat: its policy where the config says auto."""
    model = config.model
    shape = dict(VARIANTS[model.variant])
    shape |= {k: model[k] for k in ("width", "depth", "heads", "ffn") if model[k]}
    same = ("patch_size", "image_size", "registers", "layerscale", "antialias", "offset")
    return ViT(
        **shape,
        **{k: model[k] for k in same},
        remat=remat if model.remat == AUTO else model.remat,
        attention=platform if model.attention == "auto" else model.attention,
        dtype=jnp.dtype(config.compute_dtype),
    )


def objective_of(
    config, shards: int = 1, platform: str = "cpu", remat: str = "none", chip: flops.Chip | None = None
) -> Objective:
    """Networks and constants of the objective; shards: devices the batch is split over; chip: what they are."""
    dtype = jnp.dtype(config.compute_dtype)
    backbone, head, loss = backbone_of(config, platform, remat), config.head, config.loss
    rate, depth = config.model.drop_path, backbone.depth
    rates = [rate] * depth if config.model.drop_path_uniform else list(np.linspace(0, rate, depth))
    patches = (config.views.global_size // config.model.patch_size) ** 2
    return Objective(
        backbone=backbone,
        dino_head=DINOHead(head.prototypes, head.hidden, head.bottleneck, head.layers, dtype),
        ibot_head=DINOHead(head.ibot_prototypes, head.ibot_hidden, head.ibot_bottleneck, head.ibot_layers, dtype)
        if head.separate else None,
        group_size=config.group_size,
        koleo_group=config.koleo_group,
        masked_budget=masking.token_budget(
            2 * config.group_size, patches, config.masks.probability, tuple(config.masks.ratio)
        ),
        drop_rates=tuple(float(r) for r in rates),
        centring=loss.centring,
        sinkhorn_iterations=loss.sinkhorn_iterations,
        centre_momentum=loss.centre_momentum,
        student_temperature=loss.student_temperature,
        dino_weight=loss.dino,
        ibot_weight=loss.ibot,
        koleo_weight=loss.koleo,
        init_std=config.model.init_std,
        init_position=config.model.init_position,
        shards=shards,
        logits_budget=loss.logits_budget or (2**24 if chip is not None and chip.memory < SMALL else 2**26),
    )


def remat_of(config, mesh) -> str:
    """What blocks recompute on the devices of a mesh: `config.model.remat`, or what "auto" comes to there.

    That is the policy that recomputes least among those whose step should fit; "none" where the memory is not known.
    """
    chip = _chip(mesh)
    if config.model.remat != AUTO or chip is None:
        return "none" if config.model.remat == AUTO else config.model.remat
    images = config.batch_size / mesh.size / config.accumulate
    objective, v = objective_of(config, mesh.size, chip=chip), config.views
    for policy in REMAT:
        need = flops.memory(objective, v.global_size, v.local_size, v.local_crops, images, policy, config.mesh.fsdp)
        if need <= MARGIN * chip.memory:
            break
    return policy


def _chip(mesh) -> flops.Chip | None:
    return flops.chip(mesh.devices.flat[0])


def optimizer_of(config) -> optim.Optimizer:
    """AdamW with the groups of `config.optim`."""
    o = config.optim
    return optim.Optimizer(
        backbone_of(config).depth, o.clip, o.layer_decay, o.patch_embed_factor, tuple(o.betas), o.eps
    )


def run_steps(config, examples: int) -> int:
    """Length of the run in steps: `config.duration` where it is set, else `config.steps`."""
    if not config.duration:
        return config.steps
    return optim.to_steps(config.duration, 0, config.batch_size, _epoch_steps(config, examples))


def _epoch_steps(config, examples: int) -> float:
    return config.epoch_steps or examples / config.batch_size


def schedules_of(config, steps: int, examples: int) -> optim.Schedules:
    """Every schedule of a run of `steps` steps over `examples` films."""
    o, epoch = config.optim, _epoch_steps(config, examples)

    def duration(value):
        return optim.to_steps(value, steps, config.batch_size, epoch)

    return optim.Schedules(
        total=duration(o.horizon) if o.horizon else steps,
        lr=(o.base_lr * optim.SCALING[o.lr_scaling](config.batch_size), o.final_lr),
        lr_warmup=duration(o.warmup),
        weight_decay=tuple(o.weight_decay),
        momentum=tuple(o.momentum),
        teacher_temperature=tuple(o.teacher_temperature),
        teacher_temperature_warmup=duration(o.teacher_temperature_warmup),
        freeze_last_layer=duration(o.freeze_last_layer),
        head_warmup=duration(o.head_warmup),
    )


# --- checks before anything is compiled ---------------------------------------------------------------


def check(config, devices: int = 1, hosts: int = 1) -> None:
    """Raise ConfigError with every impossible combination and its mend."""
    problems = [message for bad, message in _rules(config, devices, hosts) if bad]
    if problems:
        raise ConfigError("this config cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


def _rules(config, devices: int, hosts: int):
    model, views, data = config.model, config.views, config.data
    yield from _model_rules(config)
    yield from _view_rules(views)
    p = max(model.patch_size, 1)
    for name, size in [("views.global_size", views.global_size), ("views.local_size", views.local_size),
                       ("model.image_size", model.image_size)]:
        yield size % p, f"{name}={size} is no multiple of model.patch_size={p}: use {size // p * p or p}"
    batch, group, koleo = config.batch_size, config.group_size, config.koleo_group
    fits = [g for g in range(1, batch + 1) if batch % g == 0 and batch // g % devices == 0]
    per_device = f"the largest group_size that fits is {max(fits)}" if fits else (
        f"make batch_size a multiple of {devices}"
    )
    yield group < 1 or batch % group, f"batch_size={batch} is not divided by group_size={group}: {per_device}"
    if group >= 1 and batch % group == 0:
        yield batch // group % devices, (
            f"{batch // group} groups (batch_size={batch} / group_size={group}) do not spread evenly over {devices} "
            f"devices: {per_device}"
        )
    part, whole = batch // max(config.accumulate, 1), math.lcm(max(group, 1), max(koleo, 1))
    yield config.accumulate < 1 or config.accumulate > 1 and (
        batch % config.accumulate or part % devices or part // devices % whole
    ), (
        f"accumulate={config.accumulate}: each of its parts must hold whole groups on each of {devices} devices, so "
        f"batch_size={batch} must be a multiple of accumulate x {devices} x {whole}"
    )
    yield koleo < 1 or batch % koleo, f"batch_size={batch} is not divided by koleo_group={koleo}: use a divisor"
    yield batch % hosts or batch < hosts, f"batch_size={batch} rows cannot be shared by {hosts} hosts: use a multiple"
    fsdp = config.mesh.fsdp
    yield fsdp < 1 or devices % fsdp, f"mesh.fsdp={fsdp} does not divide {devices} devices: use a divisor"
    weights = data.weights
    yield not data.sources, "data.sources is empty: name at least one, e.g. ('synthetic',)"
    yield weights and len(weights) != len(data.sources), (
        f"data.weights has {len(weights)} entries for {len(data.sources)} sources: give one each, or ()"
    )
    yield any(not isinstance(w, (int, float)) or w <= 0 for w in weights), "data.weights must be positive numbers"
    yield any(not isinstance(s, str) for s in data.sources), (
        "data.sources must be names in quotes: --config.data.sources=\"('synthetic',)\""
    )
    yield config.eval.feature not in FEATURES, f"eval.feature={config.eval.feature!r}: use {' or '.join(FEATURES)}"
    yield not 0 < data.fraction <= 1, f"data.fraction={data.fraction} must be in (0, 1]"
    yield data.window not in ("random", "centre"), f"data.window={data.window!r} must be 'random' or 'centre'"
    yield config.steps < 1, f"steps={config.steps} must be at least 1"
    yield config.keep_best and not config.eval_every, "keep_best needs online evaluation: set eval_every"
    yield config.stop_after and not config.keep_best, "stop_after needs a metric: set keep_best, e.g. 'probe_auprc'"
    yield min(config.log_every, config.checkpoint_every) < 1, "log_every and checkpoint_every must be at least 1"
    yield views.local_crops < 0, f"views.local_crops={views.local_crops} must be 0 or more"
    yield from _duration_rules(config)


def _model_rules(config):
    model, optim_, loss = config.model, config.optim, config.loss
    for name, value, known in [
        ("model.variant", model.variant, VARIANTS), ("model.remat", model.remat, (*REMAT, AUTO)),
        ("model.ffn", model.ffn or "mlp", FFN), ("optim.lr_scaling", optim_.lr_scaling, optim.SCALING),
        ("loss.centring", loss.centring, ("sinkhorn", "softmax")),
        ("compute_dtype", config.compute_dtype, ("float32", "bfloat16")),
    ]:
        yield value not in known, f"{name}={value!r} must be one of {', '.join(known)}"
    if model.variant in VARIANTS:
        shape = VARIANTS[model.variant] | {k: model[k] for k in ("width", "heads") if model[k]}
        width, heads = shape["width"], shape["heads"]
        yield width % heads, f"model.width={width} is not divided by model.heads={heads}: use a divisor"
    yield model.patch_size < 1, f"model.patch_size={model.patch_size} must be at least 1"
    yield not 0 <= model.drop_path < 1, f"model.drop_path={model.drop_path} must be in [0, 1)"
    low, high = config.masks.ratio
    yield not 0 <= low <= high <= 1, f"masks.ratio={config.masks.ratio} must be an interval inside [0, 1]"
    yield not 0 <= config.masks.probability <= 1, f"masks.probability={config.masks.probability} must be in [0, 1]"
    budget = masking.token_budget(
        2 * config.group_size, (config.views.global_size // model.patch_size) ** 2,
        config.masks.probability, tuple(config.masks.ratio),
    ) if min(config.group_size, model.patch_size) > 0 else 1
    yield budget == 0 and loss.ibot > 0, (
        "no patch is ever masked (masks.probability, masks.ratio or group_size is too small): set loss.ibot=0 as well"
    )


def _view_rules(views):
    try:
        augment.ViewSettings(**views)
    except (TypeError, ValueError) as error:
        yield True, f"views: {error}"


def _duration_rules(config):
    o = config.optim
    durations = {"duration": config.duration, "optim.horizon": o.horizon} | {
        f"optim.{k}": o[k] for k in ("warmup", "teacher_temperature_warmup", "freeze_last_layer", "head_warmup")
    }
    for name, value in durations.items():
        optional = name in ("duration", "optim.horizon") and not value
        good = optional or (
            len(value) == 2 and isinstance(value[0], (int, float))
            and value[1] in ("steps", "epochs", "images", "percent")
        )
        yield not good, f"{name}={value!r} must be (number, 'steps' | 'epochs' | 'images' | 'percent')"


# --- the state and one step ---------------------------------------------------------------------------


@flax.struct.dataclass
class TrainState:
    """step: finished updates. student, teacher: {"backbone", "dino_head"[, "ibot_head"]}. centres: {} with Sinkhorn."""

    step: Array
    student: dict
    teacher: dict
    opt: Any
    centres: dict

    def items(self) -> dict:
        """The state as the items of a checkpoint."""
        rest = {"step": self.step} | ({"centres": self.centres} if self.centres else {})
        return {"student": self.student, "teacher": self.teacher, "opt": self.opt, "rest": rest}

    def with_items(self, items: dict) -> "TrainState":
        """This state with the values of `items`."""
        rest = items["rest"]
        return self.replace(
            student=items["student"], teacher=items["teacher"], opt=items["opt"],
            step=rest["step"], centres=rest.get("centres", {}),
        )


@dataclass(frozen=True)
class Step:
    """The constants of `train_step`."""

    objective: Objective
    optimizer: optim.Optimizer
    schedules: optim.Schedules
    views: augment.ViewSettings
    mean: float
    std: float
    seed: int
    accumulate: int = 1


def step_of(config, steps: int, examples: int, mesh) -> Step:
    """The step of a config on a mesh."""
    platform = mesh.devices.flat[0].platform
    objective = objective_of(config, mesh.size, platform, remat_of(config, mesh), _chip(mesh))
    views = augment.ViewSettings(**config.views)
    return Step(
        objective, optimizer_of(config), schedules_of(config, steps, examples), views,
        config.data.mean, config.data.std, config.seed, config.accumulate,
    )


def fresh_state(constants: Step, key: Array, student: dict | None = None) -> TrainState:
    """Step 0: student = teacher, fresh from the key or the given parameters."""
    student = constants.objective.init(key) if student is None else student
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        opt=constants.optimizer.init(student),
        centres=constants.objective.init_centres(),
    )


def init_state(constants: Step, mesh, student: dict | None = None) -> TrainState:
    """`fresh_state`, every array born in its place."""
    make = partial(fresh_state, constants)
    return sharding.born_sharded(make, mesh, jax.random.key(constants.seed), student)


def initial_student(config, constants: Step) -> dict | None:
    """The student that `config.init` (backbone) and `config.init_head` (heads) name, None where all is fresh.

    Position embeddings of another grid are resized; a module without weights starts fresh. Says what came from where.
    Raises encoders.WeightsError where names or shapes do not fit.
    """
    wanted = {"backbone": config.init, "heads": config.init_head}
    given = {part: encoders.load_modules(name) for part, name in wanted.items() if name not in ("", "random")}
    if not given:
        return None
    student = jax.jit(constants.objective.init)(jax.random.key(constants.seed))
    for part, (modules, lines) in given.items():
        unused = ("dino_head:", "ibot_head:") if part == "backbone" else ("backbone:",)
        for line in lines:
            if not line.startswith(unused):
                logs.say(f"init: {line}")
        names = ["backbone"] if part == "backbone" else [n for n in student if n != "backbone"]
        for name in names:
            if modules.get(name) is None:
                raise encoders.WeightsError(f"{wanted[part]} holds no {name}")
            tree = _on_grid(modules[name], constants.objective.backbone) if name == "backbone" else modules[name]
            try:
                student[name] = trees.merge(student[name], tree, wanted[part], optional=("mask_token$",))
            except ValueError as error:
                raise encoders.WeightsError(str(error)) from None
    fresh = [name for name in student if name != "backbone" and "heads" not in given]
    if fresh:
        warmup = constants.schedules.head_warmup
        meanwhile = f"; the backbone is frozen for the first {warmup} steps" if warmup else ""
        logs.say(f"init: {', '.join(fresh)} start fresh{meanwhile}")
    return student


def _on_grid(tree: dict, backbone: ViT) -> dict:
    """Position embeddings on the grid of `backbone`."""
    side = backbone.image_size // backbone.patch_size
    pos = resize_pos_embed(jnp.asarray(tree["pos_embed"]), (side, side), backbone.offset, backbone.antialias)
    return tree | {"pos_embed": pos}


def train_step(state: TrainState, batch: dict, constants: Step) -> tuple[TrainState, dict]:
    """One iteration: views, loss, clipped AdamW, then the teacher's moving average.

    batch: {"images" uint8 [B, H, W], "masks" uint8 [B, 2, ceil(N / 8)] packed bits}. All randomness is keyed by
    (seed, step, slot in the batch). Returns (state, metrics): scalars, still on the device.
    """
    objective, images = constants.objective, batch["images"]
    view_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(constants.seed), state.step))
    slots = jnp.arange(len(images))
    views = augment.views(
        view_key, images, constants.views, slots, constants.mean, constants.std, objective.backbone.dtype
    )
    patches = (constants.views.global_size // objective.backbone.patch_size) ** 2
    masks = jnp.unpackbits(batch["masks"], axis=-1, count=patches).astype(bool)
    return update(state, views, masks, drop_key, constants)


def update(state: TrainState, views: dict, masks: Array, key: Array, constants: Step) -> tuple[TrainState, dict]:
    """The part of `train_step` after the views: loss, gradient, AdamW, teacher."""
    schedule = constants.schedules.at(state.step)

    objective = constants.objective
    given = (state.student, state.teacher, state.centres, views, masks, key, schedule["teacher_temp"])
    with products(objective.backbone.dtype):
        if constants.accumulate > 1:
            (total, (metrics, centres)), grads = objective.in_parts(constants.accumulate, *given)
        else:
            (total, (metrics, centres)), grads = jax.value_and_grad(objective, has_aux=True)(*given)
    student, opt, norms = constants.optimizer.update(state.student, grads, state.opt, schedule)
    teacher = optim.ema(state.teacher, student, schedule["momentum"])
    metrics = {"loss": total} | metrics | {f"grad_norm_{module}": norm for module, norm in norms.items()}
    return state.replace(step=state.step + 1, student=student, teacher=teacher, opt=opt, centres=centres), metrics


def guarded_step(state: TrainState, batch: dict, constants: Step) -> tuple[TrainState, dict]:
    """`train_step` that keeps the last good state: a loss or gradient that is no number changes nothing but `step`.

    `step` is -1 - s from then on, s being the last good step, and later steps change nothing either: the loss is read
    one step late.
    """
    after, metrics = train_step(state, batch, constants)
    watched = [value for name, value in metrics.items() if name == "loss" or name.startswith("grad_norm")]
    good = (state.step >= 0) & jnp.isfinite(jnp.stack([jnp.float32(value) for value in watched])).all()
    before = state.replace(step=jnp.where(state.step < 0, state.step, -1 - state.step))
    return jax.tree.map(partial(jnp.where, good), after, before), metrics


def jit_step(constants: Step, state: TrainState, mesh) -> Callable:
    """train_step(state, batch), compiled for the mesh, its state donated."""
    places = sharding.shardings(state, mesh)
    return jax.jit(
        lambda state, batch: guarded_step(state, batch, constants),
        in_shardings=(places, sharding.batch_sharding(mesh)),
        out_shardings=(places, None),
        donate_argnums=0,
    )


# --- the run --------------------------------------------------------------------------------------------

def run(config, workdir: Path, observe: watch.Observe | None = None, beat: Beat = lambda step, doing: None) -> bool:
    """Train to the end, resuming from the newest sound checkpoint; False when asked to end before.

    Of several processes all call it.

    observe(step, class features of the teacher [n, D], labels) -> scores is called every `config.eval_every` steps
    where the sources have labels; beat(step, what is done now) at every change. A run that `config.stop_after` ended is
    at its end. Raises ConfigError before anything is compiled, pipeline.DataError for a source that is not there,
    FloatingPointError when the loss is no number, checkpoints.CheckpointError where none can be read or written.
    """
    devices = jax.devices()
    check(config, len(devices), jax.process_count())
    sources = pipeline.open_sources(config.data)
    steps = run_steps(config, sum(map(len, sources)))
    saved = checkpoints.Checkpoints(workdir, config.keep, config.keep_every, config.keep_best)
    try:
        start = saved.newest_sound() or 0
        best = watch.Best(config, watch.rows_until(workdir, start))
        # Hosts may see metrics.jsonl as it was a while ago: whether to train is one decision.
        if hosts.share("finished", start >= steps or best.exhausted):
            _show_finished(workdir, start, best)
            whole = True
        else:
            whole = _train(config, Path(workdir), sources, steps, start, saved, devices, observe, beat)
    except (checkpoints.CheckpointError, OSError):
        raise  # what cannot be written now cannot be waited for either
    except BaseException:
        saved.close()
        raise
    else:
        saved.close()
    return whole


def _train(config, workdir, sources, steps, start, saved, devices, observe, beat) -> bool:
    labelled = watch.labelled(config, observe)
    if config.keep_best and observe is not None and labelled is None:
        raise ConfigError(
            f"keep_best={config.keep_best!r} needs films with labels, and the sources have no labels: name a table "
            "with eval.csv and eval.columns, or set keep_best='' and stop_after=0"
        )
    mesh = sharding.make_mesh(devices, config.mesh.fsdp)
    constants = step_of(config, steps, sum(map(len, sources)), mesh)
    student = None if start else initial_student(config, constants)
    state = init_state(constants, mesh, student)
    _introduce(config, workdir, sources, steps, state, mesh)
    if start:
        state = state.with_items(saved.restore(start, state.items()))
        logs.say(f"resumed from step {start}")
    elif saved.latest() is None:
        saved.save(0, {"teacher": state.teacher})
    journal = watch.Journal(config, workdir, constants, mesh, steps, start)
    online = watch.Online(config, constants.objective, labelled, observe, journal)
    films: deque = deque(maxlen=4)  # (step, who is in its batch) of the newest ones

    def save(step, state):
        saved.save(step, state.items(), online.metrics_of(step))

    def report(step, metrics):
        saved.check()
        journal.report(step, metrics)

    def rescue(step, state):
        kept = state.replace(step=jnp.where(state.step < 0, -1 - state.step, state.step))
        if step - 1 not in (0, saved.latest()):
            saved.save(step - 1, kept.items())
        _write_replay(config, workdir, sources, step, dict(films)[step])

    with jax.set_mesh(mesh), loop.Terminated() as stop:
        _, last = loop.run(
            state, jit_step(constants, state, mesh), _feed(config, sources, steps, start, mesh, films),
            start=start, steps=steps, report=report, evaluate=online.evaluate, meter=journal.meter,
            should_save=lambda step: step % config.checkpoint_every == 0 or online.best.step == step,
            save=save, stop=lambda step: hosts.ends_at(step, bool(stop)) or online.best.exhausted, beat=beat,
            rescue=rescue,
        )
    journal.close()
    if online.best.exhausted:
        logs.say(f"ended at step {last}: {online.best}")
    elif last < steps:
        logs.say(f"asked to end: step {last} is saved; the same command continues")
    return online.best.exhausted or last >= steps


def _introduce(config, workdir, sources, steps, state, mesh) -> None:
    """Say what is about to run: data first, so that nobody takes a synthetic run for a real one."""
    counts = ", ".join(f"{name}: {len(s)} films" for name, s in zip(config.data.sources, sources, strict=True))
    logs.say(f"data: {' and '.join(sorted({s.kind for s in sources})).upper()} ({counts})")
    overview = parameter_overview.get_parameter_overview(state.student, include_stats=False)
    if hosts.index() == 0:
        logs.write_whole(workdir / "parameters.txt", overview + "\n")
    sizes = ", ".join(f"{name} {trees.count(tree):,}" for name, tree in state.student.items())
    logs.say(f"parameters: {sizes} (each one in {workdir / 'parameters.txt'})")
    several = f" of {hosts.count()} processes" if hosts.count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    logs.say(f"{steps} steps of {config.batch_size} films on {mesh.size} x {kind}{several}")


def _feed(config, sources, steps, start, mesh, films):
    """Batches on the devices, from step `start` on; who is in them goes to `films`."""
    hosts, host = jax.process_count(), jax.process_index()
    share = config.batch_size // hosts
    spec = pipeline.MaskSpec(
        config.group_size, config.views.global_size, config.model.patch_size, config.masks.probability,
        tuple(config.masks.ratio),
    )
    rows = pipeline.Rows(host * share, share, config.batch_size)
    batches = pipeline.batches(
        config.data, rows=rows, steps=steps, start=start, seed=config.seed, sources=sources, masks=spec,
        tell=partial(logs.say, each=True),
    )
    for step, batch in enumerate(batches, start + 1):
        films.append((step, batch["film"]))
        yield sharding.to_devices({k: batch[k] for k in ("images", "masks")}, mesh)


def _write_replay(config, workdir: Path, sources, step: int, films: np.ndarray) -> None:
    """Which films were in the batch of a step that went wrong, as replay-STEP.json."""
    names = pipeline.weighted(config.data)[0]
    rows = [row for part in hosts.gather("replay", films.tolist()) for row in part]
    if hosts.index() == 0:
        batch = [
            {"slot": slot, "source": names[number], "film": film, "name": pipeline.name_of(sources[number], film)}
            for slot, (number, film) in enumerate(rows)
        ]
        found = {"step": step, "seed": config.seed, "batch_size": config.batch_size, "batch": batch}
        logs.write_whole(workdir / f"replay-{step}.json", json.dumps(found, indent=1) + "\n")


def _show_finished(workdir: Path, step: int, best: watch.Best) -> None:
    """What a finished run came to, on stdout."""
    if hosts.index():
        return
    why = f": {best}" if best.exhausted else ""
    logs.say(f"{workdir} is finished at step {step}{why}; to train anew give another --workdir")
    rows = logs.read_metrics(workdir)
    print(json.dumps(rows[-1] if rows else {"step": step}))


def config_differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """The fields in which two configs, as `json.loads` gives them, differ: "field: old -> new"."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += config_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines
