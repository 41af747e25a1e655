"""The chain, in real processes: train, be killed, resume, finish, be refused; on synthetic and on real films."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raddino_jax import logs

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--config=configs/quickstart.py", "--config.batch_size=16", "--config.group_size=2", "--config.koleo_group=8",
    "--config.model.width=32", "--config.model.depth=2", "--config.model.heads=2", "--config.model.patch_size=8",
    "--config.model.image_size=32", "--config.views.global_size=32", "--config.views.local_size=16",
    "--config.head.prototypes=64", "--config.head.bottleneck=16", "--config.head.hidden=32",
    "--config.data.image_size=40", "--config.data.synthetic_size=64", "--config.log_every=1",
    "--config.checkpoint_every=4", "--config.steps=12", "--config.then=()", "--config.eval.films=60",
    "--config.eval_every=6",
]


def command(workdir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "raddino_jax.main", f"--workdir={workdir}", *TINY, *more]


def start(workdir: Path, *more: str) -> subprocess.Popen:
    """The run in the background on one device; what it says goes to files beside the workdir."""
    with open(f"{workdir}.out", "w") as out, open(f"{workdir}.err", "w") as err:
        one_device = os.environ | {"XLA_FLAGS": ""}
        return subprocess.Popen(command(workdir, *more), cwd=ROOT, env=one_device, stdout=out, stderr=err)


def run(workdir: Path, *more: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run."""
    process = start(workdir, *more)
    process.wait(timeout=300)
    return process.returncode, *(Path(f"{workdir}.{stream}").read_text() for stream in ("out", "err"))


def computed(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in logs.TIMINGS} for row in logs.read_metrics(workdir)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = run(workdir, "--config.then=('probe','figures')")
    assert code == 0, err
    return workdir


def test_a_run_leaves_config_metrics_and_checkpoints(finished):
    rows = computed(finished)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"loss", "dino_global", "dino_local", "ibot", "koleo", "lr", "weight_decay", "momentum", "teacher_temp",
            "grad_norm_backbone", "grad_norm_dino_head"} <= rows[0].keys()
    total = sum(rows[3][k] for k in ("dino_global", "dino_local", "ibot", "koleo"))
    assert rows[3]["loss"] == pytest.approx(total, rel=1e-6)
    assert json.loads((finished / "config.json").read_text())["steps"] == 12
    assert sorted(p.name for p in (finished / "checkpoints").iterdir() if p.name.isdigit()) == ["0", "12", "4", "8"]


def test_the_end_of_a_run_compares_teacher_initialisation_and_pixels(finished):
    rows = json.loads((finished / "results.json").read_text())
    keys = {"task", "dataset", "encoder", "metric", "class", "value", "std", "n", "folds", "seed", "data", "config"}
    assert all(keys <= row.keys() for row in rows)
    assert {row["data"] for row in rows} == {"synthetic"}
    for encoder in ("teacher", "init", "pixels"):
        mine = {row["metric"] for row in rows if row["encoder"] == encoder and row["class"] == "macro"}
        assert {"auprc", "knn_accuracy"} <= mine
    online = [row for row in logs.read_metrics(finished) if "probe_auprc" in row]
    assert [row["step"] for row in online] == [6, 12]


def test_the_report_stands_alone(finished):
    page = (finished / "report.html").read_text()
    assert len(page) < 5e6 and "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == len(list((finished / "figures").glob("*.png"))) >= 6
    assert "SYNTHETIC" in page
    assert all(path.with_suffix(".csv").exists() for path in (finished / "figures").glob("*.png"))


def wait_for(condition, workdir, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, Path(f"{workdir}.err").read_text()
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def test_a_killed_run_resumes_to_the_same_metrics(finished, tmp_path):
    workdir = tmp_path / "killed"
    process = start(workdir)
    saved = workdir / "checkpoints" / "4"
    wait_for(lambda: len(logs.read_metrics(workdir)) >= 6 and saved.is_dir(), workdir, process)
    process.kill()
    process.wait()
    code, _, err = run(workdir)
    assert code == 0, err
    assert "resumed from step" in err
    assert computed(workdir) == computed(finished)


def test_sigterm_saves_and_ends_with_the_code_asked_for_and_does_nothing_else(tmp_path):
    workdir = tmp_path / "asked"
    process = start(workdir, "--config.steps=2000", "--config.checkpoint_every=2000", "--unfinished=75")
    wait_for(lambda: len(logs.read_metrics(workdir)) >= 3, workdir, process)
    process.send_signal(signal.SIGTERM)
    err = Path(f"{workdir}.err")
    assert process.wait(timeout=120) == 75, err.read_text()
    assert not (workdir / "results.json").exists(), "the tasks after the training wait for its end"
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit() and p.name != "0"]
    assert len(saved) == 1 and f"step {saved[0]} is saved" in err.read_text()
    assert logs.read_metrics(workdir)[-1]["step"] == saved[0]


def test_a_finished_run_says_so_and_another_config_is_refused(finished):
    code, out, err = run(finished)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["step"] == 12
    before = computed(finished)
    code, _, err = run(finished, "--config.seed=3")
    assert code == 2 and "--workdir" in err and "seed: 0 -> 3" in err and "Traceback" not in err
    assert computed(finished) == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.no_such_field=1"], "no such field in the config: no_such_field"),
        (["--config=configs/nope.py"], "no such config: [Errno 2] No such file or directory: 'configs/nope.py'"),
        (["--config=configs/figures.py:foo=1"], "foo=1: unknown config field 'foo'"),
        (["--config.group_size=3"], "largest group_size that fits is"),
        (["--config.data.sources=('chexpert',)"], "not prepared"),
        (["--config.data.sources=('folder:/no/such/folder',)"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_message_and_no_traceback(tmp_path, arguments, words):
    code, _, err = run(tmp_path / "bad", *arguments)
    assert code == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "bad" / "checkpoints").exists()


def test_trains_on_real_films(cxr, tmp_path):
    code, _, err = run(tmp_path / "real", f"--config.data.sources=('folder:{cxr / 'images'}',)", "--config.steps=3")
    assert code == 0, err
    assert "data: REAL" in err and len(computed(tmp_path / "real")) == 3
