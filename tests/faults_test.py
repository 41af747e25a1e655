"""Faults done for real: processes killed, frozen and asked to end, disks full, files damaged. Nothing may be lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import TINY, Run, rows, saved
from PIL import Image

from raddino_jax import checkpoints, heartbeat, starts

# Real processes, killed and frozen: minutes, and not to be run beside other work.
pytestmark = pytest.mark.slow

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
    workdir = tmp_path / "copy"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    return workdir


# --- checkpoints that are damaged ------------------------------------------------------------------------------------


def largest(step: Path) -> Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step: Path) -> str:
    path = largest(step)
    os.truncate(path, path.stat().st_size // 2)
    return "other bytes"


def remove(step: Path) -> str:
    path = largest(step)
    path.unlink()
    return "missing"


def flip(step: Path) -> str:
    path = largest(step)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    return "other bytes"


def unseal(step: Path) -> str:
    (step / checkpoints.DIGESTS).write_text("{")
    return "cannot be read"


@pytest.mark.parametrize("harm", [truncate, remove, flip, unseal])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_found(copied, harm):
    assert checkpoints.damage(copied / "checkpoints" / "16") == []
    words = harm(copied / "checkpoints" / "16")
    store = checkpoints.Checkpoints(copied)
    assert store.newest_sound() == 12
    assert saved(copied) == [0, 12] and [p.name for p in (copied / "damaged").iterdir()] == ["16-1"]
    assert words in "".join(checkpoints.damage(copied / "damaged" / "16-1"))
    store.close()


def test_a_run_whose_newest_checkpoint_has_a_flipped_bit_goes_on_from_the_one_before_to_the_same_end(whole, copied):
    flip(copied / "checkpoints" / "16")
    run = Run(copied).finish()
    assert "checkpoint 16 is damaged" in run.err() and "resumed from step 12" in run.err()
    assert rows(copied) == rows(whole)
    assert 16 in saved(copied), "the step was saved again"


def test_each_changed_bit_of_any_file_of_a_checkpoint_is_seen_and_named(copied):
    step = copied / "checkpoints" / "16"
    rng = random.Random(0)
    files = sorted(p for p in step.rglob("*") if p.is_file() and p.name not in checkpoints.NOT_DIGESTED)
    for path in rng.sample(files, 8):
        content = bytearray(path.read_bytes())
        if not content:
            continue
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        before = path.read_bytes()
        path.write_bytes(content)
        assert checkpoints.damage(step) == [f"{path.relative_to(step)} has other bytes than were written"]
        path.write_bytes(before)
    assert checkpoints.damage(step) == []


def test_a_run_without_a_sound_checkpoint_does_not_begin_anew_by_itself(copied):
    for step in ("12", "16"):
        truncate(copied / "checkpoints" / step)
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


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
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


def folder(path: Path, good: int, bad: int) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(good):
        Image.fromarray(rng.integers(0, 255, (48, 48), np.uint8)).save(path / f"good{i:02d}.png")
    for i in range(bad):
        whole = (path / "good00.png").read_bytes()
        (path / f"bad{i:02d}.png").write_bytes(whole[: len(whole) // 3])
    return path


def test_films_that_cannot_be_decoded_are_skipped_and_counted_and_too_many_end_the_run(tmp_path):
    few, many = folder(tmp_path / "few", 30, 2), folder(tmp_path / "many", 20, 30)
    run = Run(tmp_path / "run", f"--config.data.sources=('folder:{few}',)", "--config.steps=6").finish()
    assert len(rows(tmp_path / "run")) == 6
    assert "bad00.png" in run.err() and "bad01.png" in run.err() and "skipped, 2 so far" in run.err()
    run = Run(tmp_path / "other", f"--config.data.sources=('folder:{many}',)", "--config.steps=6")
    assert run.wait() == [2]
    assert "11 films cannot be decoded" in run.err() and "bad" in run.err() and "Traceback" not in run.err()


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


def test_a_changed_config_is_listed_and_refused_unless_forced_and_harmless_changes_pass(copied):
    refused = Run(copied, "--config.optim.base_lr=0.5", "--config.log_every=2")
    assert refused.wait() == [2]
    assert "optim.base_lr" in refused.err() and "--force" in refused.err() and "log_every" not in refused.err()
    forced = Run(copied, "--config.optim.base_lr=0.0005", "--config.log_every=2", "--force").finish()
    assert "config changed: log_every: 1 -> 2\n" in forced.err()
    assert "(forced)" in forced.err() and "resumed from step 16" in forced.err()
    assert json.loads((copied / "config.json").read_text())["optim"]["base_lr"] == 0.0005


def test_every_start_is_recorded_with_what_ran_where(copied):
    before = (copied / "starts.jsonl").read_text().splitlines()
    Run(copied, processes=2).finish()
    lines = [json.loads(line) for line in (copied / "starts.jsonl").read_text().splitlines()]
    assert len(lines) == len(before) + 1 == 2
    alone, both = lines
    assert [h["process"] for h in both["hosts"]] == [0, 1] and len(alone["hosts"]) == 1
    assert both["hosts"][0]["pid"] != both["hosts"][1]["pid"] and both["hosts"][1]["devices"] == ["131072: cpu"] or (
        len(both["hosts"][1]["devices"]) == 1
    )
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


@pytest.mark.slow
def test_a_process_whose_films_are_slow_is_named_and_one_whose_films_never_come_is_ended(tmp_path):
    more = ("--config.data.cache_gib=0", "--config.data.threads=1", "--tell_every=5", "--hang=20", LONG)
    run = Run(tmp_path / "run", *more, program=SLOW.format(first=0.3, later=10**6), processes=2)
    run.until(lambda: "host 1" in run.err() and "holds the others up" in run.err())
    assert "host 0" in run.err(), "a line for each host"
    ends_within(run, [0, 1], 120)
    assert "host 1" in run.err() and "hangs" in run.err() and "(data)" in run.err()


# --- what the heartbeat concludes ------------------------------------------------------------------------------------


def peer(process: int, step: int, doing: str = "step", heard: float = 100.0, moved: float = 100.0) -> heartbeat.Peer:
    return heartbeat.Peer({"process": process, "name": "n", "pid": 1, "step": step, "doing": doing}, heard, moved)


def test_a_verdict_falls_on_the_silent_and_on_the_one_behind_and_on_nobody_else():
    def judged(*peers, now=110.0):
        return heartbeat.verdict(list(peers), now, silence=30, hang=60)

    assert judged(peer(0, 7), peer(1, 7)) == ""
    assert "host 1" in judged(peer(0, 7), peer(1, 7, heard=70)) and "40 s" in judged(peer(0, 7), peer(1, 7, heard=70))
    assert judged(peer(0, 7), peer(1, 6, moved=100)) == "", "behind, but not for long"
    assert "host 1" in judged(peer(0, 7), peer(1, 6, "data", moved=40))
    assert "host 1" in judged(peer(0, 7, "saving", moved=40), peer(1, 7, "data", moved=40)), "earlier in the same step"
    assert judged(peer(0, 7, moved=0), peer(1, 7, moved=0)) == "", "all compile, or all wait: nobody is behind"
    assert judged(peer(0, 7), peer(1, 6, "finished", heard=0, moved=0)) == "", "who has finished may be silent"


def test_a_step_is_an_outlier_against_those_before_it_and_a_straggler_against_the_others():
    assert heartbeat.outlier(9.0, [1.0] * 5) == "", "too few to tell"
    assert "1.00 s" in heartbeat.outlier(9.0, [1.0] * 20)
    assert heartbeat.outlier(2.9, [1.0] * 20) == "" and heartbeat.outlier(0.3, [0.01] * 20) == ""
    beats = [{"process": i, "name": "n", "own": own, "step_seconds": 1.0} for i, own in enumerate((0.01, 0.5, 0.02))]
    assert [line[:6] for line in heartbeat.stragglers(beats)] == ["host 1"]
    assert heartbeat.stragglers([b | {"own": 0.5} for b in beats]) == [], "all wait alike: it is the store, not a host"


# --- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_change_no_digit(tmp_path):
    """Half of them fall while a checkpoint is being written."""
    words = ["--config.steps=120", "--config.checkpoint_every=3"]
    Run(tmp_path / "whole", *words).finish()
    rng, workdir, lost, saving = random.Random(7), tmp_path / "killed", [], 0
    for kill in range(20):
        run = Run(workdir, *words)
        reached = (saved(workdir) or [0])[-1]
        run.until(lambda reached=reached: (saved(workdir) or [0])[-1] > reached)
        if kill % 2:
            run.until(lambda: list((workdir / "checkpoints").glob("*tmp*")))
        else:
            time.sleep(rng.random() * 0.5)
        saving += bool(list((workdir / "checkpoints").glob("*tmp*")))
        assert run.processes[0].poll() is None, "the run ended before it was killed: make it longer"
        at = run.steps()
        run.kill()
        lost.append(at - (saved(workdir) or [0])[-1])
    Run(workdir, *words).finish()
    print(f"20 kills survived, {saving} while saving; steps lost: mean {np.mean(lost):.1f}, most {max(lost)}")
    assert rows(workdir) == rows(tmp_path / "whole")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 121))
