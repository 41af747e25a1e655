#!/usr/bin/env bash
# N processes of one run on this machine: one per GPU, or for a try-out on the CPU.
#
#   bash launch/local.sh N --config=configs/multicxr.py --workdir=runs/mine [--config.x=y ...]
#
# On GPUs process i sees GPU i alone; without any, DEVICES=4 gives each process four virtual CPU devices. What process 0
# says goes to the terminal, what the others say to $LOGS/host-I.log (default: a new folder in /tmp). When one
# process fails, all end, and so does this script, with its code. SIGTERM and Ctrl-C are passed on: the run saves first.
# PYTHON=/path/to/python names another interpreter than that of .venv.
set -uo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
case ${1:-} in '' | *[!0-9]* | 0) fail "give the number of processes first: bash launch/local.sh 2 --config=..." ;; esac
processes=$1
shift
if [ -n "${PYTHON:-}" ]; then
  CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && python=$PYTHON
else
  use_venv core
fi
LOGS=${LOGS:-$(mktemp -d -t raddino_jax.XXXXXX)}
mkdir -p "$LOGS"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
[ -z "${DEVICES:-}" ] || export JAX_NUM_CPU_DEVICES=$DEVICES
say "$processes processes; those after the first write to $LOGS"

pids=()
for ((i = 0; i < processes; i++)); do
  words=(-m raddino_jax.main --coordinator="127.0.0.1:$port" --processes="$processes" --process="$i" "$@")
  [ "$gpus" -lt "$processes" ] || export CUDA_VISIBLE_DEVICES=$i
  if [ "$i" = 0 ]; then "$python" "${words[@]}" & else "$python" "${words[@]}" &>"$LOGS/host-$i.log" & fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

code=0
for pid in "${pids[@]}"; do
  # A wait that a signal interrupted (code above 128, process still there) is taken up again.
  while wait "$pid"; one=$?; [ "$one" -gt 128 ] && kill -0 "$pid" 2>/dev/null; do :; done
  [ "$one" = 0 ] || [ "$code" != 0 ] || code=$one
done
exit "$code"
