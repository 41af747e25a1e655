"""Run one config: python -m raddino_jax.main --config=configs/NAME.py [--workdir=DIR] [--config.a.b=value ...].

The first checkpointed run of a workdir writes config.json there; the same command continues it.
"""

import os
import sys
import traceback
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from raddino_jax import checkpoints, encoders, heartbeat, hosts, logs, sharding, starts, train
from raddino_jax.data import labels, pipeline
from raddino_jax.evals import demographics, figures, linear, predict, probe, report, segment, table


def pretrain(config, workdir: Path, beat: train.Beat) -> bool:
    """Pre-training with the probe's scores as its online evaluation; False when asked to end before its last step."""
    return train.run(config, workdir, observe=probe.observe, beat=beat)


def judge(config, workdir: Path) -> None:
    """The paper's probe of any encoder (configs/probe.py), or that of a pre-training's own run, after it."""
    (linear if "protocol" in config else probe).run(config, workdir)


TASKS = {
    "pretrain": pretrain, "probe": judge, "segment": segment.run, "predict": predict.run, "figures": figures.run,
    "demographics": demographics.run, "table": table.run, "report": report.run,
}  # fmt: skip

MENDABLE = (
    train.ConfigError, pipeline.DataError, labels.LabelError, encoders.WeightsError, starts.WorkdirError,
    hosts.ClusterError,
)
TOGETHER = ("pretrain", "report")  # tasks that several processes share
ON_A_RUN = ("figures", "predict", "table")  # tasks that read a finished run and bring no config of their own

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/quickstart.py.")
_FORCE = flags.DEFINE_bool("force", False, "Go on in a workdir of another config; the differences are listed.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where no cluster says so.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", -1, "Number of this process from 0, with --coordinator.")
_SILENCE = flags.DEFINE_float("silence", 30.0, "Seconds without a beat after which a process is taken for dead.")
_HANG = flags.DEFINE_float("hang", 900.0, "Seconds that a process may stay behind the others before the run is ended.")
_TELL_EVERY = flags.DEFINE_float("tell_every", 60.0, "Seconds between two lines about each process.")
_UNFINISHED = flags.DEFINE_integer("unfinished", 0, "Exit code of a run that saved and ended because it was asked to.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; default runs/<config file name>.")


def main(_) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # libraries log every save at length
    hosts.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    sharding.keep_memory()
    pulse, beats = heartbeat.Pulse(), None
    if hosts.count() > 1:
        beats = heartbeat.Heartbeat(pulse, _SILENCE.value, _HANG.value, _TELL_EVERY.value)
    try:
        if not _run(pulse, beats):
            sys.exit(_UNFINISHED.value)
    except MENDABLE as error:
        _refuse(error)
        _end(beats, error, 2)
    except FloatingPointError as error:
        logs.say(f"raddino_jax: {error}")
        _end(beats, error, 1)
    except checkpoints.CheckpointError as error:
        if beats is not None:
            beats.suspect()  # a peer that died while all were saving looks like this too
        logs.say(f"raddino_jax: {error}", each=True)
        _end(beats, error, 1)
    except OSError as error:
        if error.errno not in starts.REFUSALS:
            traceback.print_exc()  # no workdir that refuses: where it came from is what helps
        logs.say(f"raddino_jax: {error}: {starts.remedy(error)}", each=True)
        _end(beats, error, 1)
    except Exception as error:
        if beats is not None:
            beats.suspect()
            traceback.print_exc()
        _end(beats, error, 1)
        raise


def _run(pulse: heartbeat.Pulse, beats: heartbeat.Heartbeat | None) -> bool:
    """Do what the config asks for; False when asked to end before."""
    config, workdir = _CONFIG.value, Path(_WORKDIR.value or Path("runs") / _config_name())
    if config is None:
        raise train.ConfigError("no config: give --config=configs/NAME.py, e.g. configs/quickstart.py")
    for task in (config.task, *config.then):
        if task not in TASKS:
            raise train.ConfigError(f"task {task!r} (config.task, config.then) must be one of {', '.join(TASKS)}")
    if hosts.count() > 1 and config.task not in TOGETHER:
        raise train.ConfigError(
            f"task={config.task} runs in one process, on all devices of its machine; only {' and '.join(TOGETHER)} are "
            f"shared by several, and these are {hosts.count()}"
        )
    here = starts.Workdir(workdir)
    if config.task in ON_A_RUN:
        _need_run(config, workdir)
    else:
        here.enter()
        here.settle(config, train.config_differences, _FORCE.value)
        here.record(config, jax.devices())
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "raddino_jax" / "xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    tasks = [config.task, *config.then]
    whole = True
    if config.task == "pretrain":
        whole, tasks = pretrain(config, workdir, pulse), tasks[1:]
    elif config.task == "report":
        whole = report.write(config, workdir, pulse)
    if beats is not None:
        beats.leave()
        hosts.leave()
    for task in tasks if whole and hosts.index() == 0 else ():
        TASKS[task](config, workdir)
    return whole


def _end(beats: heartbeat.Heartbeat | None, error: Exception, code: int) -> None:
    """Exit with this code, after telling the other processes why."""
    if beats is not None:
        beats.give_up(f"{type(error).__name__}: {error}", code)
    if isinstance(error, checkpoints.CheckpointError | OSError):
        hosts.quit_now(code)  # Orbax would still try to write, and bury what was said in its own complaints
    if code != 1 or isinstance(error, FloatingPointError):
        sys.exit(code)


def _config_name() -> str:
    """Name of the config file without path, suffix and arguments."""
    given = flags.FLAGS["config"].config_filename if _CONFIG.value is not None else ""
    return Path(given.partition(":")[0]).stem or "run"


def _need_run(config, workdir: Path) -> None:
    named = config.get("encoder") or config.get("runs")  # then the workdir is where the pictures go
    if not named and not (workdir / "config.json").exists():
        raise train.ConfigError(f"{workdir} holds no run (no config.json); name one with --workdir")


def cli() -> None:
    """Console entry: errors a user can mend are one message and exit code 2, not a traceback."""
    try:
        app.run(main, flags_parser=starts.parse)
    except MENDABLE as error:
        sys.exit(_refuse(error))


def _refuse(error: Exception) -> int:
    logs.say(f"raddino_jax: {error.args[0] if error.args else error}")
    return 2


if __name__ == "__main__":
    cli()
