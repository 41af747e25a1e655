#!/usr/bin/env bash
# From a fresh machine to the test suite. Needs bash, Python 3.11 to 3.13 and, the first time, a network.
#
#   bash launch/test.sh [pytest arguments]                   e.g. -m slow, tests/losses_test.py, -x
#
# On Linux, PyPI's torch brings several GB of CUDA libraries along. Without a GPU this leaves them out:
#
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/test.sh
#
# Works from any directory; relative paths in the arguments begin at the repository root.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
use_venv test
# The whole suite runs in a process per core, at most four, each with files of its own.
if [ $# -eq 0 ]; then set -- --numprocesses=auto --maxprocesses=4 --dist=loadfile; fi
exec "$python" -m pytest "$@"
