"""The start of a run: its command line, and its workdir with one run at a time, one config, a record of the start."""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from raddino_jax import hosts, logs

PACKAGES = ("raddino_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What may change between the starts of one run: where and how often to save and say, not what is computed.
HARMLESS = (
    "log_every", "checkpoint_every", "keep", "keep_every", "eval_every", "then", "data.threads", "data.prefetch",
    "data.cache_gib", "data.data_dir", "model.remat", "model.attention", "loss.logits_budget", "mesh.fsdp",
)
OF_A_START = {"config.json", "starts.jsonl", "lock"}  # what a workdir holds before anything is computed
ENDS = ("results.json", "rows.json", "films_*/rows.json", "reports.jsonl", "reports.part.jsonl")  # not computed twice
SEEN_WITHIN = 30.0  # seconds in which a file must show up on another host; NFS caches a folder for that long

REFUSALS = {  # errors of a file system that another workdir may get round, and what to do
    errno.ENOSPC: "make room on that disk, then start the same command again",
    errno.EDQUOT: "your quota is used up: make room, then start the same command again",
    errno.EROFS: "that file system is mounted read-only; give a --workdir that can be written",
    errno.EACCES: "you may not write there; give a --workdir that is yours",
    errno.EPERM: "you may not write there; give a --workdir that is yours",
}


class WorkdirError(ValueError):
    """A workdir that this run cannot use; the message says why and what to do."""


class Workdir:
    """The workdir of a run that is starting; all processes call the methods, in this order."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.lock = None

    def enter(self) -> None:
        """Make the folder, see that it can be written, keep other runs out and see that all hosts have it."""
        hosts.first("enter", self._enter, WorkdirError)
        if hosts.count() > 1:
            self._shared()

    def _enter(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in filter(Path.is_dir, (self.path, self.path / "checkpoints")):
                probe = folder / f".written-by-{os.getpid()}"
                probe.write_text("x")
                probe.unlink()
            self.lock = (self.path / "lock").open("a+")
        except OSError as error:
            what = REFUSALS.get(error.errno, "give a --workdir that can be written")
            raise WorkdirError(f"{self.path} cannot be written ({error.strerror}): {what}") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process
        except BlockingIOError:
            self.lock.seek(0)
            raise WorkdirError(
                f"a run is going on in {self.path} ({self.lock.read().strip() or 'unknown'}): wait, end it, "
                "or give another --workdir"
            ) from None
        except OSError as error:
            logs.say(f"{self.path} is on a file system without locks ({error.strerror}): see that only one run uses it")
        self.lock.truncate(0)
        self.lock.write(f"process id {os.getpid()} on {socket.gethostname()} since {_now()}\n")
        self.lock.flush()

    def _shared(self) -> None:
        """Every host has to see what process 0 writes. Raises WorkdirError that names those which do not."""
        token = hosts.share("token", f".shared-{os.getpid()}-{time.time_ns()}")
        if hosts.index() == 0:
            (self.path / token).write_text("x")
        hosts.share("written", True)
        seen, end = False, time.monotonic() + SEEN_WITHIN
        while not (seen := (self.path / token).exists()) and time.monotonic() < end:
            time.sleep(0.2)
        found = hosts.gather("seen", [seen, socket.gethostname()])
        if hosts.index() == 0:
            (self.path / token).unlink()
        blind = [f"host {i} ({name})" for i, (saw, name) in enumerate(found) if not saw]
        if blind:
            raise WorkdirError(
                f"{self.path.absolute()} is not one folder for all: {', '.join(blind)} cannot see what host 0 "
                f"({found[0][1]}) writes there. Give a --workdir on a file system that all hosts share"
            )

    def settle(self, config, differences: Callable[[dict, dict], list[str]], force: bool = False) -> None:
        """Write config.json, or refuse a workdir that belongs to another config. Says what differs.

        A start that ended before it had computed anything, as with a wrong config, does not claim the workdir. Where
        force overrules a difference that matters, results of the config before are moved aside.
        differences(old, new) -> "field: old -> new" of two configs.
        """
        text = config.to_json(indent=2, sort_keys=True) + "\n"
        hosts.first("settle", lambda: self._settle(text, differences, force), WorkdirError)

    def _settle(self, text: str, differences, force: bool) -> None:
        path = self.path / "config.json"
        if path.exists():
            try:
                old = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise WorkdirError(f"{path} is damaged ({error}): restore it, or give another --workdir") from error
            changed = differences(old, json.loads(text))
            grave = [line for line in changed if line.partition(":")[0] not in HARMLESS]
            if grave and not force and self._computed():
                raise WorkdirError(
                    f"{self.path} belongs to a run with another config; give another --workdir, take these back, or "
                    "go on with --force:\n" + "\n".join(f"  - {line}" for line in grave)
                )
            for line in changed:
                logs.say(f"config changed: {line}" + (" (forced)" if force and line in grave else ""))
            if grave:
                self._set_ends_aside()
        logs.write_whole(path, text)

    def _computed(self) -> bool:
        """Whether there is anything that only a run that got going leaves; `checkpoints/` is made a little before."""
        found = [p for p in self.path.iterdir() if not p.is_dir() or any(p.iterdir())]
        return bool({p.name for p in found} - OF_A_START)

    def _set_ends_aside(self) -> None:
        """Rename what evaluations take for their end: they would tell it as what the new config came to."""
        for path in sorted(p for pattern in ENDS for p in self.path.glob(pattern)):
            number = 1
            while (target := path.with_stem(f"{path.stem}-{number}")).exists():
                number += 1
            path.rename(target)
            logs.say(f"{path} is of the config before: it is now {target.name}")

    def record(self, config, devices: list[jax.Device]) -> None:
        """Add this start to starts.jsonl: when, command, config, versions, git revision, hosts and their devices."""
        here = {
            "process": hosts.index(), "host": socket.gethostname(), "pid": os.getpid(), "cpus": os.cpu_count(),
            "devices": [f"{d.id}: {d.device_kind}" for d in devices if d.process_index == hosts.index()],
            "python": platform.python_version(),
        }
        layout = hosts.gather("layout", here)
        if hosts.index():
            return
        row = {
            "started": _now(), "command": shlex.join([Path(sys.executable).name, *sys.argv]), "folder": os.getcwd(),
            "git": revision(), "versions": _versions(), "hosts": layout,
            "slurm_job": os.environ.get("SLURM_JOB_ID", ""), "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "config": json.loads(config.to_json()),
        }
        with (self.path / "starts.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def remedy(error: OSError) -> str:
    """What to do about an error of the operating system, which need not come from the workdir."""
    if error.errno in REFUSALS:
        return REFUSALS[error.errno]
    if error.filename is not None:
        return f"see that {error.filename} is there and can be used"
    return "once that is mended, start the same command again"


def revision() -> str:
    """The git revision that runs, with "+" where files differ from it; "" outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        head, changed = (
            subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=20, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.strip() + ("+" if changed.strip() else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def parse(argv: list[str]) -> list[str]:
    """Flags and config from the command line, for `app.run`; what cannot be is one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS["config"].value, "task", None)  # a config that failed to load fails here
        return rest
    except OSError as error:  # of ml_collections, with all that it tried
        said = f"no such config: {str(error).strip().splitlines()[-1].strip()}; configs/ holds the ready ones"
    except (AttributeError, KeyError) as error:  # of ml_collections, with the field in quotes
        said = "no such field in the config: " + " ".join(re.sub(r"\\n|[\\'\"]", " ", str(error.args[0])).split())
    except (flags.Error, TypeError, ValueError) as error:
        # ml_collections puts a whole traceback into what it says of a config that raises.
        said = re.sub(r"Error whilst parsing config file:.*\n\w+: ", "", str(error), flags=re.DOTALL).strip()
    logs.say(f"raddino_jax: {said}")
    sys.exit(2)
