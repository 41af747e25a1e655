#!/usr/bin/env bash
# A run on a Cloud TPU VM slice: the same command on every worker.
#
#   TPU=name ZONE=zone bash launch/tpu_vm.sh --config=configs/multicxr.py --workdir=/mnt/shared/runs/mine [...]
#
# Environment:
#   TPU, ZONE    the TPU VM and its zone; PROJECT, where it is not gcloud's default
#   CHECKOUT     folder of this repository on every worker, default raddino_jax in the home folder
#   SETUP=1      first make .venv there and install with the tpu extra (once per TPU VM)
#   DRY_RUN=1    print the command instead of running it
# The workdir must be on a disk that all workers mount (Filestore, or a bucket with gcsfuse). jax finds the workers by the
# TPU's metadata. A preempted slice is lost as a whole: make it anew, and the same command goes on from the newest
# checkpoint.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}"
checkout=${CHECKOUT:-raddino_jax}
command="cd $(printf %q "$checkout")"
if [ -n "${SETUP:-}" ]; then
  command+=" && python3 -m venv .venv && .venv/bin/python -m pip install -q -e '.[tpu]'"
fi
command+=" && exec .venv/bin/python -m raddino_jax.main"
for word in "$@"; do command+=" $(printf %q "$word")"; done
words=(gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all --command="$command")
if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${words[@]}"; echo; else exec "${words[@]}"; fi
