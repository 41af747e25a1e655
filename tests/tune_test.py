"""Tuning: updates are PyTorch's, parts are the whole batch, meshes agree, a resumed run is the run that was not cut."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from transformers import get_cosine_schedule_with_warmup

from raddino_jax import logs, sharding
from raddino_jax import params as trees
from raddino_jax.evals import tune
from raddino_jax.evals.tune import Tune
from raddino_jax.evals.writer import Writer
from raddino_jax.models import llava
from raddino_jax.models.llava import IMAGE

SIZES = dict(vocabulary=64, width=32, depth=1, heads=4, hidden=64, positions=32)
STEPS, BATCH, CHANNELS = 6, 8, 5


def made(lora=0, remat=False, **more) -> tuple[Tune, dict]:
    writer = Writer.of(SIZES, lora=lora, remat=remat)
    settings = dict(lr=1e-2, warmup=0.3, betas=(0.9, 0.999), weight_decay=0.1, clip=1.0, steps=STEPS) | more
    return Tune(writer, None, **settings), writer.init(jax.random.key(0), CHANNELS)


def batches(start=0):
    """Texts of differing lengths, so that parts of a batch weigh differently."""
    for step in range(start, STEPS):
        rng = np.random.default_rng(step)
        prompt = [1, 7, IMAGE, IMAGE, 8]
        answers = [[*rng.integers(9, 60, rng.integers(1, 12)), 2] for _ in range(BATCH)]
        examples = [([*prompt, *answer], [-100] * len(prompt) + answer) for answer in answers]
        yield llava.batch(examples, 18) | {"features": rng.normal(size=(BATCH, 2, CHANNELS)).astype(np.float32)}


def walk(constants: Tune, params: dict, fsdp: int = 1, devices: int = 1) -> tuple[dict, list[dict]]:
    """Parameters after all steps on a mesh, and the metrics of each."""
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp)
    state = constants.fresh(sharding.place(params, mesh))
    state = jax.device_put(state, sharding.shardings(state, mesh))
    step, found = tune.jit_step(constants, state, {}, mesh), []
    with jax.set_mesh(mesh):
        for batch in batches():
            state, metrics = step(state, {}, sharding.to_devices(batch, mesh))
            found.append({name: float(value) for name, value in metrics.items()})
    return trees.flatten(jax.device_get(state.params)), found


def test_updates_are_pytorchs_adamw_under_the_trainers_schedule():
    constants, params = made()
    found, metrics = walk(constants, params)
    flat = {name: torch.nn.Parameter(torch.tensor(np.array(value))) for name, value in trees.flatten(params).items()}
    optimizer = torch.optim.AdamW(flat.values(), lr=1e-2, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.3 * STEPS), STEPS)
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: constants.loss(params, {}, {}, batch)))
    for batch, told in zip(batches(), metrics, strict=True):
        here = {name: jnp.array(p.detach().numpy()) for name, p in flat.items()}
        total, grads = gradient(trees.unflatten(here), batch)
        count = (batch["labels"] != llava.IGNORED).sum()
        for name, grad in trees.flatten(grads).items():
            flat[name].grad = torch.tensor(np.array(grad / count))
        norm = torch.nn.utils.clip_grad_norm_(flat.values(), 1.0)
        assert told["loss"] == pytest.approx(float(total / count), rel=1e-5)
        assert told["lr"] == pytest.approx(schedule.get_last_lr()[0], rel=1e-5)
        assert told["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        schedule.step()
    assert metrics[0]["lr"] == 0 and metrics[0]["grad_norm"] > 1  # clipping is seen
    for name, value in found.items():
        np.testing.assert_allclose(value, flat[name].detach().numpy(), rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("lora", [0, 2])
def test_parts_and_meshes_walk_the_trajectory_of_the_whole_batch_on_one_device(lora):
    # Adam makes a sign of a small gradient, and of its rounding: only the losses before are compared tightly.
    constants, params = made(lora)
    whole, metrics = walk(constants, params)
    for other, mesh in ((made(lora, accumulate=4)[0], {}), (constants, dict(fsdp=4, devices=8)),
                        (made(lora, accumulate=2)[0], dict(fsdp=4, devices=4)),
                        (made(lora, remat=True)[0], dict(fsdp=2, devices=4))):
        found, told = walk(other, params, **mesh)
        for a, b in zip(metrics, told, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-5) and b["grad_norm"] == pytest.approx(
                a["grad_norm"], rel=1e-3)
        held = [name for name in whole if lora and name.startswith("llama/")]
        assert bool(held) == bool(lora)
        assert all((found[name] == trees.flatten(params)[name]).all() for name in held)


def test_parameters_and_moments_are_spread_over_the_mesh():
    constants, params = made(lora=4)
    mesh = sharding.make_mesh(jax.devices(), 8)
    state = jax.eval_shape(constants.fresh, params)
    places = trees.flatten(jax.tree.map(lambda place: place.spec, sharding.shardings(state.params, mesh)))
    whole = {name.rpartition("/")[2] for name, spec in places.items() if "fsdp" not in spec}
    assert whole == {"scale", "bias", "a", "b"}  # of each pair, the side of the rank
    assert all("fsdp" in places[f"llama/layers_0/{name}/kernel"] for name in ("attn/q", "attn/o", "gate", "up", "down"))
    assert "fsdp" in places["llama/words"] and "fsdp" in places["llama/lm_head/kernel"]


def config_of(**more):
    fields = dict(batch_size=BATCH, log_every=1, checkpoint_every=2, eval_every=0, lr=1e-2, mesh=dict(fsdp=0))
    return ConfigDict(fields | more)


def test_networks_are_compiled_with_the_mesh_of_the_run_in_sight(tmp_path):
    """Without it weights would not be gathered, and the attention of a TPU not be split."""
    found = []

    def encode(frozen, images):
        found.append(dict(jax.sharding.get_abstract_mesh().shape))
        return images

    def films(start):
        for batch in batches(start):
            yield {("images" if name == "features" else name): value for name, value in batch.items()}

    constants, params = made(steps=1)
    tune.run(config_of(), dataclasses.replace(constants, encode=encode), params, {}, films, tmp_path)
    assert found and all(shape == {"data": 1, "fsdp": 8} for shape in found)


class Cut(BaseException):
    """The end of a run at a place that no handler expects."""


def test_a_run_that_was_cut_goes_on_to_the_same_digits(tmp_path):
    constants, params = made(lora=2)

    def cut(start):
        for number, batch in enumerate(batches(start), start=start):
            if number == 4:
                raise Cut
            yield batch

    whole = tune.run(config_of(), constants, params, {}, batches, tmp_path / "whole")
    with pytest.raises(Cut):
        tune.run(config_of(), constants, params, {}, cut, tmp_path / "cut")
    given = []
    found = tune.run(config_of(), constants, params, {}, lambda start: given.append(start) or batches(start),
                     tmp_path / "cut")
    assert given == [2] or given == [4]
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    names = ("step", "loss", "lr", "grad_norm")
    told = [[[row[name] for name in names] for row in logs.read_metrics(tmp_path / run)] for run in ("whole", "cut")]
    assert told[0] == told[1] and [row[0] for row in told[0]] == list(range(1, STEPS + 1))
    again = tune.run(config_of(), constants, params, {}, None, tmp_path / "whole")  # a finished run asks for nothing
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_the_loss_of_the_validation_part_is_that_of_its_tokens(tmp_path):
    constants, params = made(lr=0.0)
    parts = list(batches())[:2]
    tune.run(config_of(eval_every=3), constants, params, {}, batches, tmp_path, val=lambda: iter(parts))
    rows = {row["step"]: row for row in logs.read_metrics(tmp_path)}
    assert [step for step, row in rows.items() if "val_loss" in row] == [3, 6]
    total = sum(float(constants.loss(params, {}, {}, part)) for part in parts)
    count = sum((part["labels"] != llava.IGNORED).sum() for part in parts)
    assert rows[6]["val_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    constants, params = made(lr=float("inf"))
    with pytest.raises(FloatingPointError, match="lower config.lr"):
        tune.run(config_of(), constants, params, {}, batches, tmp_path)


def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path, monkeypatch):
    constants, params = made()
    step = Tune.step
    monkeypatch.setattr(Tune, "step", lambda *given: (lambda state, told: (state, told | {"grad_norm": jnp.nan}))(
        *step(*given)))
    with pytest.raises(FloatingPointError, match="step 1: grad_norm nan"):
        tune.run(config_of(checkpoint_every=1), constants, params, {}, batches, tmp_path)
    assert not [p for p in (tmp_path / "checkpoints").glob("*") if p.name.isdigit()]
