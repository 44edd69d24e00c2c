#!/bin/bash
# Scores of all finished stages of a run, or of one CHECKPOINT; by one task.
#
#   sbatch slurm/submit_eval.sh
#   PRESET=tacc GPUS=4 bash slurm/submit_eval.sh    checks here first, then submits
#
# From the repository's root. What it takes from the environment: the head of slurm/common.sh.
#SBATCH --job-name=eval
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=experiments/%x-%j.log
root=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$root/slurm/common.sh" ] || root=${SLURM_SUBMIT_DIR-} # SLURM runs a copy elsewhere
[ -e "$root/slurm/common.sh" ] || {
    echo "error: start slurm/submit_eval.sh from the repository's root; '$root' is not it" >&2
    exit 2
}
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$root/slurm/common.sh"

PRESET=${PRESET:-tacc}
command=(run --stage eval)
one_task=yes # scores are computed by rank 0 alone
main "$0" "$@"
