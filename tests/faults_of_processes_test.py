"""Faults of whole processes, done for real: killed, frozen and asked to end, disks full. Nothing may be lost.

Minutes, and not to be run beside other work: a machine that stands still looks like a process that hangs.
"""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from cluster import TINY, Run, copy_before, rows, saved
from PIL import Image

from raddino_jax import checkpoints, starts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a busy machine compiles for minutes

LONG = "--config.steps=100000"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 20 steps, checkpoints at 0, 12, 16 and 20."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    Run(workdir).finish()
    return workdir


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """The same run as it was at step 16, in a folder of its own."""
    return copy_before(20, whole, tmp_path / "copy")


def test_a_run_without_a_sound_checkpoint_ends_with_a_word_and_not_with_a_traceback(copied):
    for step in (12, 16):
        shutil.rmtree(copied / "checkpoints" / str(step) / "student")
    run = Run(copied)
    assert run.wait() == [1]
    assert "every checkpoint" in run.err() and "--workdir" in run.err() and "Traceback" not in run.err()


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; remount(options) changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_a_clear_word_and_a_usable_checkpoint(small_disk, tmp_path):
    workdir = small_disk / "run"
    run = Run(tmp_path / "run", f"--workdir={workdir}", LONG)  # what it says goes to another disk
    run.until(lambda: 4 in saved(workdir))
    with (small_disk / "ballast").open("wb") as ballast:
        try:
            while True:
                ballast.write(bytes(2**16))
                ballast.flush()
        except OSError:
            pass
    filled = time.monotonic()
    assert run.wait(120) == [1], run.err()
    print(f"seconds from the full disk to the end of the run: {time.monotonic() - filled:.1f}")
    last = [line for line in run.err().splitlines() if line][-1]  # Orbax complains at length before it
    assert last.startswith("raddino_jax: ") and "o space left" in last and "same command" in last, last
    newest = saved(workdir)[-1]
    assert newest >= 4 and checkpoints.damage(workdir / "checkpoints" / str(newest)) == []
    (small_disk / "ballast").unlink()
    last = Run(tmp_path / "again", f"--workdir={workdir}", LONG)
    last.until(lambda: len(rows(workdir)) > 20)
    last.kill()
    assert f"resumed from step {newest}" in last.err()
    steps = [row["step"] for row in rows(workdir)]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost, none is there twice"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(whole, small_disk):
    workdir = small_disk / "run"
    shutil.copytree(whole, workdir)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = Run(small_disk.parent / "outside", f"--workdir={workdir}")
    assert run.wait() == [2]
    assert "Read-only file system" in run.err() and "--workdir" in run.err() and "Traceback" not in run.err()


def test_a_checkpoint_folder_that_takes_nothing_any_more_ends_the_run_with_a_clear_word(tmp_path):
    workdir = tmp_path / "run"
    run = Run(workdir, LONG)
    run.until(lambda: 4 in saved(workdir))
    folder = str(workdir / "checkpoints")
    if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        run.kill()
        pytest.skip("making a folder immutable needs root and a file system that knows how")
    try:
        assert run.wait(120) == [1], run.err()
        again = Run(workdir, LONG)
        assert again.wait() == [2], again.err()
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    for err in (run.err(), again.err()):
        assert "checkpoint" in err and "not permitted" in err and "Traceback" not in err


# --- numbers and films -----------------------------------------------------------------------------------------------

POISON = """
import numpy as np
from raddino_jax import main, train
import jax.numpy as jnp
plain = train.train_step
def poisoned(state, batch, constants):
    after, metrics = plain(state, batch, constants)
    bad = jnp.where(state.step == 6, jnp.nan, 0.0)
    return after.replace(student=__import__("jax").tree.map(lambda x: x + bad.astype(x.dtype), after.student)), (
        metrics | {"loss": metrics["loss"] + bad})
train.train_step = poisoned
main.cli()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_state_and_the_batch(whole, tmp_path, processes):
    workdir = tmp_path / "nan"
    run = Run(workdir, program=POISON, processes=processes)
    assert set(run.wait()) == {1}, run.err()
    assert "loss is nan at step 7" in run.err() and "Traceback" not in run.err()
    assert saved(workdir) == [0, 4, 6], "step 6, the last good one, was not due but is kept"
    assert rows(workdir) == rows(whole)[:6] if processes == 1 else len(rows(workdir)) == 6
    found = json.loads((workdir / "replay-7.json").read_text())
    assert found["step"] == 7 and [film["slot"] for film in found["batch"]] == list(range(16))
    assert all(film["source"] == "synthetic" and 0 <= film["film"] < 64 for film in found["batch"])
    Run(workdir).finish()  # healthy again: what was kept is the state itself
    if processes == 1:
        assert rows(workdir) == rows(whole)


def test_too_many_films_that_cannot_be_decoded_end_all_processes_with_a_word(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (48, 48), np.uint8)).save(films / f"good{i:02d}.png")
    film = (films / "good00.png").read_bytes()
    for i in range(40):
        (films / f"bad{i:02d}.png").write_bytes(film[: len(film) // 3])
    run = Run(tmp_path / "run", f"--config.data.sources=('folder:{films}',)", processes=2)
    codes = run.wait()
    assert 2 in codes and 0 not in codes, run.err(0) + run.err(1)
    said = run.err(0) + run.err(1)
    assert "11 films cannot be decoded" in said and "bad" in said and "Traceback" not in said


# --- who starts ------------------------------------------------------------------------------------------------------


def test_two_runs_in_one_workdir_the_second_is_refused_and_a_kill_leaves_no_lock(tmp_path):
    workdir = tmp_path / "run"
    first = Run(workdir, LONG)
    first.until(lambda: first.steps() >= 2)
    second = Run(workdir, LONG, called="second")
    assert second.wait() == [2]
    assert "a run is going on" in second.err() and f"process id {first.processes[0].pid}" in second.err()
    assert first.processes[0].poll() is None
    first.processes[0].kill()
    first.processes[0].wait()
    third = Run(workdir, LONG, called="third")
    third.until(lambda: "step" in third.err())
    third.kill()


def test_every_start_is_recorded_with_what_ran_where(copied):
    before = (copied / "starts.jsonl").read_text().splitlines()
    Run(copied, processes=2).finish()
    lines = [json.loads(line) for line in (copied / "starts.jsonl").read_text().splitlines()]
    assert len(lines) == len(before) + 1 == 2
    alone, both = lines
    assert [h["process"] for h in both["hosts"]] == [0, 1] and len(alone["hosts"]) == 1
    assert both["hosts"][0]["pid"] != both["hosts"][1]["pid"]
    assert [len(h["devices"]) for h in both["hosts"]] == [1, 1], "each names its own"
    assert both["git"].rstrip("+") == starts.revision().rstrip("+") and both["versions"]["jax"]
    assert TINY[0] in both["command"] and both["config"]["steps"] == 20


def test_processes_that_do_not_share_the_workdir_are_told(tmp_path):
    """Two folders of the same purpose: what the first writes the second does not see."""
    program = (
        "import os\nfrom raddino_jax import main, starts\nstarts.SEEN_WITHIN = 2\n"
        f"os.chdir('{tmp_path}/' + os.environ['PROCESS'])\nmain.cli()\n"
    )
    for i in "01":
        (tmp_path / i).mkdir()
    run = Run(tmp_path / "logs", "--workdir=run", program=program, processes=2)
    assert run.wait() == [2, 2], run.err(1)
    assert "is not one folder for all: host 1" in run.err() and "Traceback" not in run.err(0) + run.err(1)


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [[0, 1], [1]], ids=["both", "only the second"])
def test_sigterm_to_some_of_several_processes_saves_one_step_and_ends_all_well(tmp_path, asked):
    run = Run(tmp_path / "run", LONG, "--config.checkpoint_every=100000", processes=2)
    run.until(lambda: run.steps() >= 4)
    for i in asked:
        run.processes[i].send_signal(signal.SIGTERM)
    assert run.wait(120) == [0, 0], run.err(0) + run.err(1)
    newest = saved(run.workdir)[-1]
    assert f"step {newest} is saved" in run.err() and run.steps() == newest


def ends_within(run: Run, who: list[int], seconds: float) -> float:
    began = time.monotonic()
    for i in who:
        try:
            assert run.processes[i].wait(timeout=seconds) != 0
        except subprocess.TimeoutExpired:
            run.kill()
            raise AssertionError(f"process {i} went on for {seconds} s:\n{run.err(i)}") from None
    return time.monotonic() - began


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "freezes"])
@pytest.mark.parametrize("victim", [1, 0], ids=["a peer", "the coordinator"])
def test_when_one_dies_or_freezes_the_others_end_within_a_minute_and_name_it(tmp_path, fault, victim):
    run = Run(tmp_path / "run", LONG, "--silence=15", processes=2)
    run.until(lambda: run.steps() >= 4)
    run.processes[victim].send_signal(fault)
    seconds = ends_within(run, [1 - victim], 60)
    deadline = time.monotonic() + 10  # the child that has the last word writes it after the end
    while f"host {victim}" not in run.err(1 - victim) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert f"host {victim}" in run.err(1 - victim), run.err(1 - victim)
    print(f"seconds until the other ended: {seconds:.1f}")
    run.kill()


SLOW = """
import os, time
from raddino_jax import main
from raddino_jax.data import pipeline
plain = pipeline.Synthetic.film
count = 0
def film(self, index):
    global count
    count += 1
    if os.environ["PROCESS"] == "1":
        time.sleep({first} if count < 100 else {later})
    return plain(self, index)
pipeline.Synthetic.film = film
main.cli()
"""


def test_a_process_whose_films_are_slow_is_named_and_one_whose_films_never_come_is_ended(tmp_path):
    more = ("--config.data.cache_gib=0", "--config.data.threads=1", "--tell_every=5", "--hang=20", LONG)
    run = Run(tmp_path / "run", *more, program=SLOW.format(first=0.3, later=10**6), processes=2)
    run.until(lambda: "host 1" in run.err() and "holds the others up" in run.err())
    assert "host 0" in run.err(), "a line for each host"
    ends_within(run, [0, 1], 120)
    assert "host 1" in run.err() and "hangs" in run.err() and "(data)" in run.err()


# --- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_change_no_digit(tmp_path):
    """In turn: between two saves, while a checkpoint is being written, and anywhere, the start included."""
    words = ["--config.steps=300", "--config.checkpoint_every=3"]
    began = time.monotonic()
    Run(tmp_path / "whole", *words).finish()
    alone = time.monotonic() - began
    rng, workdir, lost, saving, began = random.Random(7), tmp_path / "killed", [], 0, time.monotonic()
    folder = workdir / "checkpoints"
    for kill in range(20):
        run = Run(workdir, *words)
        if kill % 3 == 2:
            time.sleep(rng.random() * 8)
        else:
            reached = (saved(workdir) or [0])[-1]
            run.until(lambda reached=reached: (saved(workdir) or [0])[-1] > reached)
            if kill % 3:
                run.until(lambda: list(folder.glob("*tmp*")))
            else:
                time.sleep(rng.random() * 0.4)
        saving += bool(list(folder.glob("*tmp*")))
        assert run.processes[0].poll() is None, "the run ended before it was killed: make it longer"
        at = run.steps()
        run.kill()
        lost.append(at - (saved(workdir) or [0])[-1])
    Run(workdir, *words).finish()
    seconds = (time.monotonic() - began - alone) / 20
    print(
        f"20 kills survived, {saving} of them while saving; steps lost: mean {np.mean(lost):.1f}, most {max(lost)}; "
        f"{seconds:.1f} s lost per kill, starting included"
    )
    assert rows(workdir) == rows(tmp_path / "whole")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 301))
    for item in ("student", "teacher", "opt"):
        ours, wanted = (checkpoints.load_arrays(path, item) for path in (workdir, tmp_path / "whole"))
        jax.tree.map(np.testing.assert_array_equal, ours, wanted)
