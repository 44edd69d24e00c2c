#!/bin/bash
# The whole pipeline at smoke size, by two tasks: that this cluster, its queue and these scripts get along.
#
#   sbatch slurm/submit_smoke_test.sh
#   PRESET=tacc-smoke GPUS=4 bash slurm/submit_smoke_test.sh    checks here first, then submits
#
# From the repository's root. What it takes from the environment: the head of slurm/common.sh.
#SBATCH --job-name=smoke_test
#SBATCH --time=00:30:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=experiments/%x-%j.log
#SBATCH --ntasks=2
root=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$root/slurm/common.sh" ] || root=${SLURM_SUBMIT_DIR-} # SLURM runs a copy elsewhere
[ -e "$root/slurm/common.sh" ] || {
    echo "error: start slurm/submit_smoke_test.sh from the repository's root; '$root' is not it" >&2
    exit 2
}
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$root/slurm/common.sh"

PRESET=${PRESET:-local-smoke}
command=(run --stage all)
main "$0" "$@"
