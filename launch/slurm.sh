#!/usr/bin/env bash
#SBATCH --job-name=raddino_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
# A run on a SLURM cluster: one task per GPU, saved and resubmitted when it is preempted or its time is up.
#
#   sbatch launch/slurm.sh --config=configs/multicxr.py --workdir=/shared/runs/mine [--config.x=y ...]
#   sbatch --nodes=4 --partition=gpu --time=8:00:00 launch/slurm.sh ...       sbatch's own options come first
#
# Submit from the checkout; --workdir and the data must be on a file system that all nodes share. Environment:
#   PYTHON       the interpreter, default .venv/bin/python of the checkout (make it once with launch/quickstart.sh)
#   SRUN_ARGS    more words for srun, e.g. a container
# 300 s before the end of its time, or when it is preempted (SIGTERM, or USR1 with PreemptParameters=send_user_signal), the
# run saves the step it is in and ends; the job then queues again under the same number and goes on from there. A run
# that ends by itself, well or not, is not queued again. At preemption a partition's GraceTime must be long enough for a
# step and a save. jax finds the other tasks by SLURM's environment.
set -uo pipefail
cd -- "${SLURM_SUBMIT_DIR:?submit this with sbatch, or use launch/local.sh}" || exit
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "slurm.sh: no $python here: submit from the checkout, or set PYTHON" >&2; exit 2; }

interrupted=""
# Only a note and the word to the tasks; what happens then is decided below, once they have ended.
interrupt() {
  [ -z "$interrupted" ] || return 0
  interrupted=yes
  echo "slurm.sh: $1; asking the run to save (job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0})" >&2
  scancel --signal=TERM "$SLURM_JOB_ID"  # to the tasks; srun itself would take it for an order to kill them
}
trap 'interrupt "time is nearly up or the job is preempted"' USR1
trap 'interrupt "preempted"' TERM

# No limit to the wait: process 0 goes on alone with what comes after the training, and what fails ends all anyhow.
# shellcheck disable=SC2086  # SRUN_ARGS are several words
srun --kill-on-bad-exit=1 --wait=0 ${SRUN_ARGS:-} "$python" -m raddino_jax.main "$@" &
srun=$!
while wait "$srun"; code=$?; [ "$code" -gt 128 ] && kill -0 "$srun" 2>/dev/null; do :; done

# At preemption SLURM sends SIGTERM to the tasks and not to this script; a job that ends well before the grace time is over
# counts as completed, so it has to ask for its return.
if scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q "PreemptTime=[0-9]"; then interrupted=yes; fi
if [ -n "$interrupted" ]; then
  scontrol requeue "$SLURM_JOB_ID" 2>/dev/null && echo "slurm.sh: queued again" >&2
  exit 0
fi
exit "$code"
