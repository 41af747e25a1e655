"""One trajectory: any number of processes and devices computes the same run, also when it changes half-way."""

import os
import signal
from pathlib import Path

import pytest
from cluster import Run, devices_here, rows, saved, tiny

from raddino_jax import train

# (processes, devices of each, fsdp)
OTHERS = [(1, 1, 1), (1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 8, 2), (2, 4, 4), (4, 2, 4), (2, 2, 2), (4, 1, 1)]


def name(mesh: tuple[int, int, int]) -> str:
    return "{}x{}-fsdp{}".format(*mesh)


def walk(workdir: Path, mesh: tuple[int, int, int]) -> list[dict]:
    """The metrics of a run on a mesh, from the step that the workdir holds."""
    processes, devices, fsdp = mesh
    run = Run(workdir, f"--config.mesh.fsdp={fsdp}", processes=processes, devices=devices).finish()
    if processes > 1:
        assert f"on {processes * devices} x cpu of {processes} processes" in run.err(0)
        for other in range(1, processes):
            words = [line for line in (run.err(other) + run.out(other)).splitlines() if not line.startswith("[Gloo]")]
            assert words == [], "one process writes, the others are silent"
    return rows(workdir)


def walk_here(workdir: Path, devices: int, fsdp: int, stop_at: int = 0) -> list[dict]:
    """The metrics of a run on some of the devices of this process; asked to end at a step, as a scheduler would."""

    def beat(step, doing):
        if (step, doing) == (stop_at, "step"):
            os.kill(os.getpid(), signal.SIGTERM)

    with devices_here(devices):
        train.run(tiny(f"--config.mesh.fsdp={fsdp}"), workdir, beat=beat)
    return rows(workdir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    return walk_here(tmp_path_factory.mktemp("runs"), 1, 1)


LOSSES = ("loss", "dino_global", "dino_local", "ibot", "koleo")


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Every loss and schedule of every step within 1e-5 of its size, gradients' norms within 1e-4."""
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, 21))
    furthest: dict = {}
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        norms = {key for key in a if key.startswith("grad_norm")}
        for key in {*LOSSES, "lr", "weight_decay", "momentum", "teacher_temp"} | norms:
            furthest[key] = max(furthest.get(key, 0.0), abs(a[key] - b[key]) / max(abs(b[key]), 1e-12))
            assert a[key] == pytest.approx(b[key], rel=1e-4 if key in norms else 1e-5), f"{key} at step {a['step']}"
    print("largest relative differences: " + ", ".join(f"{k} {v:.0e}" for k, v in sorted(furthest.items()) if v))


def test_twenty_steps_of_a_run_are_twenty_different_ones(alone):
    """The comparison below could not fail on a run that stands still."""
    losses = [row["loss"] for row in alone]
    assert len(losses) == 20 and len(set(losses)) == 20
    assert max(abs(a - b) / b for a, b in zip(losses[1:], losses, strict=False)) > 1e-3


def test_eight_devices_with_split_parameters_walk_the_same_trajectory(alone, tmp_path):
    assert_same(walk_here(tmp_path, 8, 4), alone)


def test_a_run_stopped_on_one_mesh_of_this_process_goes_on_on_another(alone, tmp_path):
    walk_here(tmp_path, 8, 4, stop_at=7)
    assert saved(tmp_path)[-1] == 7 and len(rows(tmp_path)) == 7
    assert_same(walk_here(tmp_path, 1, 1), alone)


@pytest.mark.slow
def test_two_processes_with_split_parameters_walk_the_same_trajectory(alone, tmp_path):
    assert_same(walk(tmp_path / "several", (2, 1, 2)), alone)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mesh", OTHERS, ids=name)
def test_every_layout_walks_the_same_trajectory(alone, tmp_path, mesh):
    assert_same(walk(tmp_path / "other", mesh), alone)


def stopped_and_resumed(workdir: Path, first, second) -> list[dict]:
    """The metrics of a run that is asked to end on one mesh, as a scheduler would, and goes on on another."""
    processes, devices, fsdp = first
    run = Run(workdir, f"--config.mesh.fsdp={fsdp}", processes=processes, devices=devices)
    run.until(lambda: run.steps() >= 2)
    for process in run.processes:
        process.terminate()
    run.finish()
    last = saved(workdir)[-1]
    assert 2 <= last < 20, "the run was over before it could be stopped"
    assert f"step {last} is saved" in run.err()
    return walk(workdir, second)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "first, second",
    [((1, 1, 1), (2, 1, 2)), ((2, 4, 2), (1, 1, 1)), ((4, 2, 8), (1, 8, 1)), ((1, 8, 2), (4, 1, 4))],
    ids=name,
)
def test_a_run_stopped_on_any_mesh_goes_on_on_another(alone, tmp_path, first, second):
    assert_same(stopped_and_resumed(tmp_path / "moved", first, second), alone)
