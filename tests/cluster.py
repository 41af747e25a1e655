"""The smallest run, and runs of `main` in real processes, one or several on this machine.

For trajectory_test.py, faults_test.py, faults_of_processes_test.py and launch_test.py.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from configs import common, quickstart
from raddino_jax import logs

ROOT = Path(__file__).resolve().parent.parent
# The quickstart, as small as it goes; everything random stays on.
TINY = [
    f"--config={ROOT / 'configs' / 'quickstart.py'}",
    "--config.batch_size=16", "--config.group_size=2", "--config.koleo_group=8",
    "--config.model.width=32", "--config.model.depth=1", "--config.model.heads=2", "--config.model.patch_size=8",
    "--config.model.image_size=32", "--config.views.global_size=32", "--config.views.local_size=16",
    "--config.views.local_crops=1", "--config.head.prototypes=64", "--config.head.bottleneck=16",
    "--config.head.hidden=32", "--config.data.image_size=40", "--config.data.synthetic_size=64", "--config.log_every=1",
    "--config.checkpoint_every=4", "--config.steps=20", "--config.then=()", "--config.eval_every=0",
]


def tiny(*more: str):
    """The config that TINY and `more` make."""
    words = [word.removeprefix("--config.") for word in (*TINY[1:], *more)]
    return common.apply(quickstart.get_config(), ",".join(words), {})


@contextmanager
def devices_here(number: int):
    """What runs in this process meanwhile sees so many of its devices."""
    all_of_them = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: all_of_them[:number])
        yield


class Run:
    """`processes` x `devices` running one command in `workdir`; what each says is in out(i) and err(i)."""

    def __init__(self, workdir: Path, *more: str, processes: int = 1, devices: int = 1, program="", called=""):
        """program: Python that calls main.cli() itself; called: the name of the files that hold what it says."""
        self.workdir, self.called, port = Path(workdir), called or Path(workdir).name, _free_port()
        code = ["-c", program] if program else ["-m", "raddino_jax.main"]
        self.processes = []
        for i in range(processes):
            several = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={i}"]
            words = [sys.executable, *code, f"--workdir={workdir}", *TINY, *more]
            environment = os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices), "PROCESS": str(i)}
            if devices == 1:
                del environment["JAX_NUM_CPU_DEVICES"]
                environment.pop("PJRT_NPROC", None)
            with open(self._file("out", i), "w") as out, open(self._file("err", i), "w") as err:
                self.processes.append(subprocess.Popen(
                    words + (several if processes > 1 else []), cwd=ROOT, env=environment, stdout=out, stderr=err
                ))

    def _file(self, stream: str, i: int) -> Path:
        return self.workdir.with_name(f"{self.called}.{stream}{i}")

    def out(self, i: int = 0) -> str:
        return self._file("out", i).read_text()

    def err(self, i: int = 0) -> str:
        return self._file("err", i).read_text()

    def wait(self, seconds: float = 600) -> list[int]:
        """Exit codes; processes that are still there after that time are killed and the test fails."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(timeout=max(end - time.monotonic(), 0.1)) for p in self.processes]
        finally:
            self.kill()

    def finish(self) -> "Run":
        """Wait for exit codes 0."""
        codes = self.wait()
        assert set(codes) == {0}, "\n".join(f"--- process {i}: {c}\n{self.err(i)}" for i, c in enumerate(codes))
        return self

    def until(self, condition, seconds: float = 600) -> None:
        """Wait for a condition while all processes run."""
        end = time.monotonic() + seconds
        while not condition():
            for i, process in enumerate(self.processes):
                assert process.poll() is None, self.err(i)
            if time.monotonic() > end:
                self.kill()
                raise AssertionError("nothing happened in time:\n" + self.err())
            time.sleep(0.02)

    def steps(self) -> int:
        """Lines of metrics.jsonl so far."""
        return len(logs.read_metrics(self.workdir))

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


def rows(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in logs.TIMINGS} for row in logs.read_metrics(workdir)]


def saved(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def copy_before(step: int, workdir: Path, copy: Path) -> Path:
    """A copy of a run as it was before a checkpoint, but for metrics.jsonl, which is ahead."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / str(step))
    return copy


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
