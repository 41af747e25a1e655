"""Faults done for real in seconds: damaged checkpoints, no right to write, NaN, broken films, locks, other configs.

What takes several processes, kills, full disks or minutes is in faults_of_processes_test.py.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cluster import copy_before, devices_here, rows, saved, tiny
from PIL import Image

from raddino_jax import checkpoints, heartbeat, hosts, starts, train
from raddino_jax.data import pipeline

STEPS = 8
DEVICES = 2


def config(*more: str):
    """The smallest quickstart: eight steps, a checkpoint after every second."""
    return tiny(f"--config.steps={STEPS}", "--config.checkpoint_every=2", *more)


def start(workdir: Path, *more: str, beat: Callable[[int, str], None] = lambda step, doing: None, force=False) -> None:
    """What `main` does in a workdir, in this process."""
    settings, here = config(*more), starts.Workdir(workdir)
    here.enter()
    try:
        with devices_here(DEVICES):
            here.settle(settings, train.config_differences, force)
            here.record(settings, jax.devices())
            train.run(settings, workdir, beat=beat)
    finally:
        here.lock.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run: 8 steps, checkpoints 0, 4, 6 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    start(workdir)
    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1)) and saved(workdir) == [0, 4, 6, 8]
    return workdir


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """The same run as it was at step 6, in a folder of its own."""
    return copy_before(8, whole, tmp_path / "copy")


# --- a run that ends before its time ---------------------------------------------------------------------------------


class Cut(BaseException):
    """The end of a run at a place that no handler expects."""


@pytest.mark.parametrize("doing", ["evaluation", "saving"])
def test_a_run_cut_off_anywhere_goes_on_to_the_same_digits_and_no_step_is_there_twice(whole, tmp_path, doing):
    def beat(step, now):
        if (step, now) == (6, doing):
            raise Cut

    workdir = tmp_path / "cut"
    with pytest.raises(Cut):
        start(workdir, beat=beat)
    assert saved(workdir)[-1] == 4 < rows(workdir)[-1]["step"], "lines after the newest checkpoint will come again"
    start(workdir)
    assert rows(workdir) == rows(whole)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_sigterm_saves_the_step_that_the_run_is_in_and_says_so(whole, tmp_path, capsys):
    start(tmp_path, beat=lambda step, now: step == 5 and now == "step" and os.kill(os.getpid(), signal.SIGTERM))
    assert saved(tmp_path)[-1] == 5 and "step 5 is saved; the same command continues" in capsys.readouterr().err
    start(tmp_path)
    assert rows(tmp_path) == rows(whole)


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
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_found(copied, capsys, harm):
    assert checkpoints.damage(copied / "checkpoints" / "6") == []
    words = harm(copied / "checkpoints" / "6")
    store = checkpoints.Checkpoints(copied)
    assert store.newest_sound() == 4 == store.latest()
    assert "checkpoint 6 is damaged" in (said := capsys.readouterr().err) and words in said
    assert saved(copied) == [0, 4] and [p.name for p in (copied / "damaged").iterdir()] == ["6-1"]
    store.close()


def test_a_run_whose_newest_checkpoint_has_a_flipped_bit_goes_on_from_the_one_before_to_the_same_end(
    whole, copied, capsys
):
    flip(copied / "checkpoints" / "6")
    start(copied)
    said = capsys.readouterr().err
    assert "checkpoint 6 is damaged" in said and "resumed from step 4" in said
    assert rows(copied) == rows(whole)
    assert 6 in saved(copied), "the step was saved again"


def test_each_changed_bit_of_any_file_of_a_checkpoint_is_seen_and_named(copied):
    step, rng = copied / "checkpoints" / "6", random.Random(0)
    files = sorted(p for p in step.rglob("*") if p.is_file() and p.name not in checkpoints.NOT_DIGESTED)
    for path in (p for p in rng.sample(files, 8) if p.stat().st_size):
        sound = path.read_bytes()
        content, place = bytearray(sound), rng.randrange(len(sound))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert checkpoints.damage(step) == [f"{path.relative_to(step)} has other bytes than were written"]
        path.write_bytes(sound)
    assert checkpoints.damage(step) == []


def test_a_run_without_a_sound_checkpoint_does_not_begin_anew_by_itself(copied):
    for step in (4, 6):
        truncate(copied / "checkpoints" / str(step))
    before = (copied / "metrics.jsonl").read_text()
    for _ in range(2):  # what starts it may try again
        with pytest.raises(checkpoints.CheckpointError, match="every checkpoint.*step 6.*step 4.*--workdir"):
            start(copied)
    assert saved(copied) == [0, 4, 6] and not (copied / "damaged").exists()
    assert (copied / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("steps", [[0, 4, 6], [4, 6], [0]])
def test_where_no_checkpoint_at_all_is_sound_none_is_moved(copied, steps):
    for step in saved(copied):
        truncate(copied / "checkpoints" / str(step))
        if step not in steps:
            shutil.rmtree(copied / "checkpoints" / str(step))
    store = checkpoints.Checkpoints(copied)
    for _ in range(2):
        with pytest.raises(checkpoints.CheckpointError, match="every checkpoint.*--workdir"):
            store.newest_sound()
    store.close()
    assert saved(copied) == steps


# --- folders that cannot be written ----------------------------------------------------------------------------------


@contextmanager
def nobody():
    """Root may write everywhere: files are asked for as somebody else."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.mark.parametrize("locked", ["", "checkpoints"], ids=["workdir", "checkpoints"])
def test_a_folder_without_the_right_to_write_is_refused_before_anything_is_computed(locked):
    with tempfile.TemporaryDirectory() as outer:  # not tmp_path: nobody else may look below that
        os.chmod(outer, 0o755)
        workdir = Path(outer) / "run"
        (workdir / "checkpoints").mkdir(parents=True)
        os.chmod(workdir, 0o555 if not locked else 0o777)
        os.chmod(workdir / "checkpoints", 0o555)
        with nobody(), pytest.raises(starts.WorkdirError, match="Permission denied.*give a --workdir that is yours"):
            starts.Workdir(workdir).enter()
        os.chmod(workdir, 0o755)
        os.chmod(workdir / "checkpoints", 0o755)
        starts.Workdir(workdir).enter()  # with the right, nothing is wrong with it


# --- numbers and films -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_state_and_the_batch(
    whole, tmp_path, monkeypatch
):
    plain = train.train_step

    def poisoned(state, batch, constants):
        after, metrics = plain(state, batch, constants)
        bad = jnp.where(state.step == 4, jnp.nan, 0.0)
        student = jax.tree.map(lambda x: x + bad.astype(x.dtype), after.student)
        return after.replace(student=student), metrics | {"loss": metrics["loss"] + bad}

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", poisoned)
        with pytest.raises(FloatingPointError, match="loss is nan at step 5"):
            start(tmp_path, "--config.checkpoint_every=3")
    assert saved(tmp_path) == [0, 3, 4], "step 4, the last good one, was not due but is kept"
    assert rows(tmp_path) == rows(whole)[:4]
    found = json.loads((tmp_path / "replay-5.json").read_text())
    assert found["step"] == 5 and [film["slot"] for film in found["batch"]] == list(range(16))
    assert all(film["source"] == "synthetic" and 0 <= film["film"] < 64 for film in found["batch"])
    start(tmp_path)  # healthy again: what was kept is the state itself
    assert rows(tmp_path) == rows(whole)


@pytest.mark.parametrize("where", ["loss", "grad_norm_backbone"])
def test_after_a_step_whose_loss_or_gradient_is_no_number_nothing_changes_any_more(monkeypatch, where):
    def step(state, batch, constants):
        after = state.replace(step=state.step + 1, student=state.student + batch)
        return after, {"loss": jnp.float32(1), "grad_norm_backbone": jnp.float32(1)} | {where: batch}

    monkeypatch.setattr(train, "train_step", step)
    state = train.TrainState(jnp.int32(7), jnp.float32(0), jnp.float32(0), (), {})
    for batch in (1.0, jnp.inf, 1.0, 1.0):
        state, _ = train.guarded_step(state, jnp.float32(batch), None)
    assert state.step == -1 - 8 and state.student == 1, "step 8 was the last good one"


def films(path: Path, good: int, bad: int) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(good):
        Image.fromarray(rng.integers(0, 255, (48, 48), np.uint8)).save(path / f"good{i:02d}.png")
    for i in range(bad):
        film = (path / "good00.png").read_bytes()
        (path / f"bad{i:02d}.png").write_bytes(film[: len(film) // 3])
    return path


def test_films_that_cannot_be_decoded_are_skipped_and_counted_and_too_many_end_the_run(tmp_path, capsys):
    few, many = films(tmp_path / "few", 30, 2), films(tmp_path / "many", 20, 30)
    start(tmp_path / "run", f"--config.data.sources=('folder:{few}',)")
    assert len(rows(tmp_path / "run")) == STEPS
    said = capsys.readouterr().err
    assert said.count("bad00.png") == said.count("bad01.png") == 1 and "skipped, 2 so far (10 are put up with)" in said
    with pytest.raises(pipeline.DataError, match=r"11 films cannot be decoded.*bad\d\d\.png"):
        start(tmp_path / "other", f"--config.data.sources=('folder:{many}',)")


# --- who starts ------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from raddino_jax import starts
here = starts.Workdir(Path(sys.argv[1]))
here.enter()
print("in", flush=True)
time.sleep(600)
"""


def test_two_runs_in_one_workdir_the_second_is_refused_and_a_kill_leaves_no_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "in\n"
            with pytest.raises(starts.WorkdirError, match=f"a run is going on.*process id {first.pid} on"):
                starts.Workdir(tmp_path).enter()
            assert first.poll() is None
        finally:
            first.kill()
    starts.Workdir(tmp_path).enter()


def test_a_changed_config_is_listed_and_refused_unless_forced_and_harmless_changes_pass(copied, capsys):
    with pytest.raises(starts.WorkdirError) as refused:
        start(copied, "--config.optim.base_lr=0.5", "--config.log_every=2")
    said = str(refused.value)
    assert "optim.base_lr: " in said and "-> 0.5" in said and "--force" in said and "log_every" not in said
    assert json.loads((copied / "config.json").read_text())["optim"]["base_lr"] != 0.5, "it stays as it was"
    start(copied, "--config.optim.base_lr=0.0005", "--config.log_every=2", force=True)
    said = capsys.readouterr().err
    assert "config changed: log_every: 1 -> 2\n" in said and "-> 0.0005 (forced)\n" in said
    assert "resumed from step 6" in said
    assert json.loads((copied / "config.json").read_text())["optim"]["base_lr"] == 0.0005


def test_a_start_that_computed_nothing_does_not_claim_the_workdir(tmp_path):
    here = starts.Workdir(tmp_path / "run")
    here.enter()
    here.settle(config(), train.config_differences)
    here.settle(config("--config.optim.base_lr=0.5"), train.config_differences)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["base_lr"] == 0.5
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(starts.WorkdirError, match="0.5 -> 0.1"):
        here.settle(config("--config.optim.base_lr=0.1"), train.config_differences)


def test_what_another_config_came_to_is_moved_aside_where_a_start_is_forced(tmp_path, capsys):
    def settle(*more: str, force: bool = False) -> list[str]:
        capsys.readouterr()
        starts.Workdir(tmp_path).settle(config(*more), train.config_differences, force)
        return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.json*") if p.name != "config.json")

    settle()
    (tmp_path / "films_4_seed_0").mkdir()
    ends = ["results.json", "rows.json", "reports.jsonl", "reports.part.jsonl", "films_4_seed_0/rows.json"]
    for name in (*ends, "metrics.jsonl"):
        (tmp_path / name).write_text(name)
    assert settle("--config.log_every=2", force=True) == sorted((*ends, "metrics.jsonl")), "nothing that matters"
    with pytest.raises(starts.WorkdirError):
        settle("--config.seed=1")
    moved = [
        "films_4_seed_0/rows-1.json", "metrics.jsonl", "reports-1.jsonl", "reports.part-1.jsonl", "results-1.json",
        "rows-1.json",
    ]  # fmt: skip
    assert settle("--config.seed=1", force=True) == moved
    said = capsys.readouterr().err
    assert f"{tmp_path / 'results.json'} is of the config before: it is now results-1.json" in said
    assert (tmp_path / "results-1.json").read_text() == "results.json"
    (tmp_path / "results.json").write_text("newer")
    assert settle("--config.seed=2", force=True) == sorted((*moved, "results-2.json"))
    assert (tmp_path / "results-2.json").read_text() == "newer" != (tmp_path / "results-1.json").read_text()


def test_a_workdir_is_advised_for_where_it_may_be_the_cause_and_else_the_file_is_named():
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert "make room" in starts.remedy(OSError(number, "full"))
    for number in (errno.EROFS, errno.EACCES, errno.EPERM):
        assert "give a --workdir" in starts.remedy(OSError(number, "refused", "/a/b"))
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/film.png")
    for error in (missing, OSError(errno.EIO, "Input/output error"), TimeoutError(), OSError("broken")):
        said = starts.remedy(error)
        assert said and "workdir" not in said and "checkpoint" not in said
    assert "/a/film.png" in starts.remedy(missing)


def test_a_workdir_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(starts.WorkdirError, match="give a --workdir that can be written"):
            starts.Workdir(path).enter()


def test_every_start_is_recorded_with_what_ran_where(copied):
    start(copied)
    lines = [json.loads(line) for line in (copied / "starts.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    (host,) = lines[1]["hosts"]
    assert host["pid"] == os.getpid() and len(host["devices"]) == DEVICES and host["cpus"] == os.cpu_count()
    assert lines[1]["versions"]["jax"] == jax.__version__ and lines[1]["config"] == json.loads(config().to_json())
    assert Path(sys.argv[0]).name in lines[1]["command"] and lines[1]["folder"] == os.getcwd()
    assert lines[1]["git"] == starts.revision()


def test_the_revision_is_that_of_git_and_marked_where_files_differ(tmp_path, monkeypatch):
    package = tmp_path / "raddino_jax"
    package.mkdir()
    (package / "starts.py").write_text("a")
    monkeypatch.setattr(starts, "__file__", str(package / "starts.py"))
    assert starts.revision() == "", "not a checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a"]):
        subprocess.run(git + words, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert starts.revision() == head
    (package / "starts.py").write_text("b")
    assert starts.revision() == head + "+"


@pytest.mark.parametrize("given", [("h:1", 0, -1), ("", 2, 0), ("", 0, 0), ("h:1", 2, 2), ("h", 2, 0)])
def test_the_flags_of_a_cluster_are_given_together_and_fit(given):
    with pytest.raises(hosts.ClusterError, match="--coordinator"):
        hosts.join(*given)


def test_a_process_without_a_cluster_or_alone_in_it_is_alone():
    # In a process of its own: joining comes before the first use of a device.
    joined = "from raddino_jax import hosts; hosts.join(); print(hosts.count(), hosts.index())"
    assert subprocess.check_output([sys.executable, "-c", joined], text=True).split() == ["1", "0"]
    hosts.join("h:1", 1, 0)
    assert (hosts.count(), hosts.index(), hosts.client()) == (1, 0, None)
    assert hosts.gather("here", {"a": 1}) == [{"a": 1}] and hosts.share("here", 3) == 3
    assert hosts.ends_at(4, True) and not hosts.ends_at(4, False)


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
    late = judged(peer(0, 8, "writing"), peer(1, 2000, "saving", moved=40))
    assert "host 1" in late, "reports are written, and counted anew, after all steps"


def test_a_word_that_no_other_process_knows_is_an_error_where_it_is_said():
    pulse = heartbeat.Pulse()
    for known in (*heartbeat.ORDER, "writing", "finished"):
        pulse(1, known)
    with pytest.raises(ValueError, match="pondering"):
        pulse(1, "pondering")


def test_a_machine_that_was_suspended_accuses_nobody(monkeypatch):
    """After a pause of this process itself the others have as long as before to be heard."""
    clock = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(heartbeat.threading.Thread, "start", lambda thread: None)
    beats = heartbeat.Heartbeat(heartbeat.Pulse(), silence=30, hang=60)
    beats._hear({"process": 1, "name": "n", "pid": 1, "number": 1, "step": 0, "doing": "starting"})
    clock[0] += 500
    assert "host 1" in beats.fault(), "time that went by while this process ran counts"
    before = beats._forgive(1000.0)
    assert before == 1500.0 and beats.fault() == ""
    for _ in range(40):
        clock[0] += 1
        before = beats._forgive(before)
    assert "host 1" in beats.fault(), "and so does the time after it"


def test_a_step_is_an_outlier_against_those_before_it_and_a_straggler_against_the_others(capsys, monkeypatch):
    assert heartbeat.outlier(9.0, [1.0] * 5) == "", "too few to tell"
    assert "1.00 s" in heartbeat.outlier(9.0, [1.0] * 20)
    assert heartbeat.outlier(2.9, [1.0] * 20) == "" and heartbeat.outlier(0.3, [0.01] * 20) == ""
    beats = [{"process": i, "name": "n", "own": own, "step_seconds": 1.0} for i, own in enumerate((0.01, 0.5, 0.02))]
    assert [line[:6] for line in heartbeat.stragglers(beats)] == ["host 1"]
    assert heartbeat.stragglers([b | {"own": 0.5} for b in beats]) == [], "all wait alike: it is the store, not a host"


def test_a_step_that_takes_long_is_said_and_an_evaluation_in_it_does_not_count(capsys, monkeypatch):
    clock, pulse = [0.0], heartbeat.Pulse()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    for step in range(1, 16):
        pulse(step, "step")
        clock[0] += 0.1
        pulse(step, "data")
        clock[0] += 5.0 if step == 12 else 0.1
        pulse(step, "evaluation")
        clock[0] += 60.0 if step == 14 else 0.0
    said = capsys.readouterr().err.splitlines()
    assert said == ["step 12 took 5.10 s: the median is 0.20 s; 5.00 s of it for data"]
