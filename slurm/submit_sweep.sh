#!/bin/bash
# A study of architectures (modern-llm experiment) as a job array: each job trains its share of the cells.
#
#   STUDY=heads MODE=demo bash slurm/submit_sweep.sh --array=1-8    the array, and a job that compares after it
#
# The same in two steps: STUDY=heads sbatch slurm/submit_sweep.sh, and when the array has ended,
# COLLECT=yes STUDY=heads sbatch --array=1 slurm/submit_sweep.sh. What an array's job left undone, that one
# trains. STUDY is a study's name or a path, MODE is full (default) or demo.
#
# From the repository's root. What it takes from the environment: the head of slurm/common.sh.
#SBATCH --job-name=sweep
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=experiments/%x-%A_%a.log
#SBATCH --array=1-4
root=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$root/slurm/common.sh" ] || root=${SLURM_SUBMIT_DIR-} # SLURM runs a copy elsewhere
[ -e "$root/slurm/common.sh" ] || {
    echo "error: start slurm/submit_sweep.sh from the repository's root; '$root' is not it" >&2
    exit 2
}
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$root/slurm/common.sh"

PRESET=${STUDY:-heads}
command=(experiment "$PRESET" --mode "${MODE:-full}")
one_task=yes # which trains one cell on each GPU of its node
if [ -n "${SLURM_ARRAY_TASK_ID-}" ] && [ -z "${COLLECT-}" ]; then
    command+=(--cells "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
fi
main "$0" "$@"
