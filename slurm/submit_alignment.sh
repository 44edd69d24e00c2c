#!/bin/bash
# All that follows pretraining: sft, dpo, verifier, eval. A stage that fails ends the job.
#
#   sbatch slurm/submit_alignment.sh
#   PRESET=tacc GPUS=4 bash slurm/submit_alignment.sh    checks here first, then submits
#
# From the repository's root. What it takes from the environment: the head of slurm/common.sh.
# Starts from the run's own pretrain/final, or while pretraining is not finished from its newest checkpoint;
# CHECKPOINT=experiments/runs/NAME takes the newest of another run.
#SBATCH --job-name=alignment
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=experiments/%x-%j.log
root=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$root/slurm/common.sh" ] || root=${SLURM_SUBMIT_DIR-} # SLURM runs a copy elsewhere
[ -e "$root/slurm/common.sh" ] || {
    echo "error: start slurm/submit_alignment.sh from the repository's root; '$root' is not it" >&2
    exit 2
}
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$root/slurm/common.sh"

PRESET=${PRESET:-tacc}
command=(run --stage alignment)
follows=pretrain
main "$0" "$@"
