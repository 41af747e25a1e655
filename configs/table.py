"""The paper's tables and figures beside one's own runs: paper, ours, n, and the command behind each number.

    python -m raddino_jax.main --config='configs/table.py:table=1,runs=runs/*'
    python -m raddino_jax.main --config=configs/table.py:table=B1 --config.called="('runs/fresh=RAD-DINO random init',)"
    python -m raddino_jax.main --config='configs/table.py:table=figB1,runs=runs/resolution_*,dataset=synthetic'

table: 1 2 3 5 B1 C1 C2 C3 C4, figB1 figB2 figC1. Writes table_NAME.md and .csv, of figures also a PNG, into --workdir
(default runs/table); reads results.json, config.json and starts.jsonl of workdirs and changes none of them.
"""

import re

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str = "") -> ConfigDict:
    """Which table, from which runs."""
    config = ConfigDict(dict(
        task="table",
        then=(),
        table="1",
        runs="runs/*",  # pattern of workdirs
        called=(),  # "ENCODER OR WORKDIR=ROW OF THE PAPER", for runs of one's own
        dataset="",  # "" = the paper's; another one shows what the same commands give there
    ))  # fmt: skip
    return common.apply(config, re.sub(r"(^|,)\s*table=(\w+)", r"\1table='\2'", arguments), {})
