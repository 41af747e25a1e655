#!/usr/bin/env bash
# From a fresh machine to a first pre-training run on synthetic radiographs, and its probe and figures.
# Needs bash, Python 3.11 to 3.13 and, the first time, a network.
#
#   bash launch/quickstart.sh [--config.steps=20 ...]        -> runs/quickstart
#
# Works from any directory; relative paths in the arguments begin at the repository root.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
use_venv core
exec "$python" -m raddino_jax.main --config=configs/quickstart.py "$@"
