"""The pictures and report.html of a finished run.

    python -m raddino_jax.main --config=configs/figures.py --workdir=runs/quickstart

Reads config.json, metrics.jsonl, results.json and the newest checkpoint of the workdir; changes none of them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Everything else is read from the workdir."""
    return ConfigDict(dict(task="figures", then=()))
