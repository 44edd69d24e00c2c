#!/bin/bash
# Pretraining alone.
#
#   sbatch slurm/submit_pretrain_only.sh pretrain.training.lr=3e-4
#   PRESET=tacc GPUS=4 bash slurm/submit_pretrain_only.sh    checks here first, then submits
#
# From the repository's root. What it takes from the environment: the head of slurm/common.sh.
#SBATCH --job-name=pretrain_only
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=experiments/%x-%j.log
root=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$root/slurm/common.sh" ] || root=${SLURM_SUBMIT_DIR-} # SLURM runs a copy elsewhere
[ -e "$root/slurm/common.sh" ] || {
    echo "error: start slurm/submit_pretrain_only.sh from the repository's root; '$root' is not it" >&2
    exit 2
}
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$root/slurm/common.sh"

PRESET=${PRESET:-tacc}
command=(run --stage pretrain)
main "$0" "$@"
