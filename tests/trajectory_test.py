"""One trajectory: any number of processes and devices computes the same run, also when it changes half-way."""

from pathlib import Path

import pytest
from cluster import Run, rows, saved

# Real processes, killed and frozen: minutes, and not to be run beside other work.
pytestmark = pytest.mark.slow

# (processes, devices of each, fsdp)
ALONE, SEVERAL = (1, 1, 1), (2, 2, 2)
OTHERS = [(1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 8, 2), (2, 4, 4), (4, 2, 4), (2, 1, 2), (4, 1, 1)]


def name(mesh: tuple[int, int, int]) -> str:
    return "{}x{}-fsdp{}".format(*mesh)


def walk(workdir: Path, mesh: tuple[int, int, int], *more: str) -> list[dict]:
    """The metrics of a run on a mesh, from the step that the workdir holds."""
    processes, devices, fsdp = mesh
    run = Run(workdir, f"--config.mesh.fsdp={fsdp}", *more, processes=processes, devices=devices).finish()
    if processes > 1:
        assert f"on {processes * devices} x cpu of {processes} processes" in run.err(0)
        for other in range(1, processes):
            words = [line for line in (run.err(other) + run.out(other)).splitlines() if not line.startswith("[Gloo]")]
            assert words == [], "one process writes, the others are silent"
    return rows(workdir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    return walk(tmp_path_factory.mktemp("runs") / "alone", ALONE)


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Every metric of every step within 1e-5 of its size; ranks and shares of rows within what a tie may turn."""
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, 21))
    losses = {"loss", "dino_global", "dino_local", "ibot", "koleo", "lr", "weight_decay", "momentum", "teacher_temp"}
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & losses | {k for k in a if k.startswith("grad_norm")}:
            assert a[key] == pytest.approx(b[key], rel=1e-5), f"{key} at step {a['step']}"


def test_twenty_steps_of_a_run_are_twenty_different_ones(alone):
    """The comparison below could not fail on a run that stands still."""
    losses = [row["loss"] for row in alone]
    assert len(losses) == 20 and len(set(losses)) == 20
    assert max(abs(a - b) / b for a, b in zip(losses[1:], losses, strict=False)) > 1e-3


def test_two_processes_of_two_devices_with_split_parameters_walk_the_same_trajectory(alone, tmp_path):
    assert_same(walk(tmp_path / "several", SEVERAL), alone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", OTHERS, ids=name)
def test_every_layout_walks_the_same_trajectory(alone, tmp_path, mesh):
    assert_same(walk(tmp_path / "other", mesh), alone)


def stopped_and_resumed(workdir: Path, first, second) -> list[dict]:
    """The metrics of a run that is asked to end on one mesh, as a scheduler would, and goes on on another."""
    processes, devices, fsdp = first
    run = Run(workdir, f"--config.mesh.fsdp={fsdp}", processes=processes, devices=devices)
    run.until(lambda: run.steps() >= 6)
    for process in run.processes:
        process.terminate()
    run.finish()
    last = saved(workdir)[-1]
    assert 6 <= last < 20, "the run was over before it could be stopped"
    assert f"step {last} is saved" in run.err()
    return walk(workdir, second)


def test_a_run_stopped_on_one_device_goes_on_in_two_processes(alone, tmp_path):
    assert_same(stopped_and_resumed(tmp_path / "grown", ALONE, (2, 1, 2)), alone)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [((2, 4, 2), ALONE), ((4, 2, 8), (1, 8, 1)), ((1, 8, 2), (4, 1, 4))],
                         ids=name)
def test_a_run_stopped_on_any_mesh_goes_on_on_another(alone, tmp_path, first, second):
    assert_same(stopped_and_resumed(tmp_path / "moved", first, second), alone)
