"""Run one config: python -m raddino_jax.main --config=configs/NAME.py [--workdir=DIR] [--config.a.b=value ...].

The first checkpointed run of a workdir writes config.json there; the same command continues it.
"""

import json
import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from raddino_jax import encoders, logs, train
from raddino_jax.data import labels, pipeline
from raddino_jax.evals import figures, probe


def pretrain(config, workdir: Path) -> None:
    """Pre-training with the probe's scores as its online evaluation."""
    train.run(config, workdir, observe=probe.observe)


TASKS = {"pretrain": pretrain, "probe": probe.run, "figures": figures.run}

ON_A_RUN = ("figures",)  # tasks that read a finished run and bring no config of their own

# What may change between the starts of one run: where and how often to save and say, not what is computed.
HARMLESS = (
    "log_every", "checkpoint_every", "keep", "keep_every", "eval_every", "then", "data.threads", "data.prefetch",
    "data.cache_gib", "data.data_dir", "model.remat", "model.attention", "loss.logits_budget", "mesh.fsdp",
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; default runs/<config file name>.")


def main(_) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # libraries log every save at length
    config, workdir = _CONFIG.value, Path(_WORKDIR.value or Path("runs") / _config_name())
    if config is None:
        raise train.ConfigError("no config: give --config=configs/NAME.py, e.g. configs/quickstart.py")
    for task in (config.task, *config.then):
        if task not in TASKS:
            raise train.ConfigError(f"task {task!r} (config.task, config.then) must be one of {', '.join(TASKS)}")
    if config.task in ON_A_RUN:
        _need_run(workdir)
    else:
        _settle(config, workdir)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "raddino_jax" / "xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    for task in (config.task, *config.then):
        TASKS[task](config, workdir)


def _config_name() -> str:
    """Name of the config file without path, suffix and arguments."""
    given = flags.FLAGS["config"].config_filename if _CONFIG.value is not None else ""
    return Path(given.partition(":")[0]).stem or "run"


def _need_run(workdir: Path) -> None:
    if not (workdir / "config.json").exists():
        raise train.ConfigError(f"{workdir} holds no run (no config.json); name one with --workdir")


def _settle(config, workdir: Path) -> None:
    """Write config.json, or refuse a workdir that belongs to another config."""
    path, text = workdir / "config.json", config.to_json(indent=2, sort_keys=True) + "\n"
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
        changed = train.config_differences(json.loads(path.read_text()), json.loads(text))
        changed = [line for line in changed if line.partition(":")[0] not in HARMLESS]
        if changed:
            raise train.ConfigError(
                f"{workdir} belongs to a run with another config; give another --workdir, or take these back:\n"
                + "\n".join(f"  - {line}" for line in changed)
            )
    logs.write_whole(path, text)


def cli() -> None:
    """Console entry: errors a user can mend are one message and exit code 2, not a traceback."""
    try:
        app.run(main, flags_parser=_parse)
    except (train.ConfigError, pipeline.DataError, labels.LabelError, encoders.WeightsError) as error:
        sys.exit(_refuse(error))
    except FloatingPointError as error:
        logs.say(f"raddino_jax: {error}")
        sys.exit(1)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        sys.exit(_refuse(error))


def _refuse(error: Exception) -> int:
    logs.say(f"raddino_jax: {error.args[0] if error.args else error}")
    return 2


if __name__ == "__main__":
    cli()
