# shellcheck shell=bash
# What the submit scripts share; they source it. docs/slurm.md tells how it is used.
#
# Under sbatch a script is the job: it checks the config, starts one task a GPU, and has itself started
# again when it was stopped before its end. By hand (bash slurm/submit_eval.sh) it checks the config and
# gives itself to sbatch.
#
# What may be set in the environment, for every script:
#   PRESET           preset, or a path to a .json or .yaml; each script has its default
#   RUN_NAME         name of the run; default: that of the preset
#   OUTPUT_DIR       everything is written below it; default: as the config says, runs in experiments/runs
#   OVERRIDES        section.field=value words, separated by spaces; more may follow the script's name
#   CHECKPOINT       start from it, not from the stage before
#   MODERN_LLM_DATA  root of the data sets
#   PYTHON           interpreter with the package; default: .venv of the repository
#   GPUS             GPUs of a node = tasks on it; default: those that SLURM gave, else those of nvidia-smi;
#                    on nodes without: the job's --ntasks, on CPUs
#   DISTRIBUTED      ddp (default), zero1 or fsdp, of several tasks; "config": as the config says
#   LAUNCHER         srun (default), or torchrun: srun starts one of it on each node
#   MASTER_ADDR, MASTER_PORT   where the tasks meet; default: the first node, a port made of the job's id
#   MAX_STARTS       starts in a row without progress before the job gives up; default 3
#   HF_HUB_OFFLINE   1 (default): a job does not ask the Hugging Face hub
# and by hand only, where sbatch has flags of its own:
#   PARTITION, ACCOUNT, TIME_LIMIT, NODES, GPUS, and CHAIN (so many jobs, one after the other)
#
# Exit codes are those of modern-llm, and 76: given up after MAX_STARTS starts without progress.

set -Eeuo pipefail
trap 'say "error: line $LINENO of ${BASH_SOURCE[0]##*/} failed"' ERR # never without a word

GAVE_UP=76
SIGNALS=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2

say() { printf '%s slurm: %s\n' "$(date +%FT%T)" "$*" >&2; }

fail() {
    local code=$1
    shift
    say "error: $*"
    exit "$code"
}

# Only a variable that has passed may stand in arithmetic: bash runs commands inside of others.
need_count() {
    [[ ${!1-} =~ ^[1-9][0-9]{0,8}$ ]] || fail 2 "$1='${!1-}' is not a count: $2"
}

find_python() {
    python=${PYTHON:-$root/.venv/bin/python}
    command -v "$python" >/dev/null 2>&1 ||
        fail 2 "no $python: make it with 'bash speedrun.sh setup', or set PYTHON to one with the package"
}

# `arguments` of modern-llm: the script's `command`, then overrides and flags of the user.
compose() {
    local words=()
    if [ -z "${RUN_NAME-}" ]; then
        RUN_NAME=${PRESET##*/}
        RUN_NAME=${RUN_NAME%.*}
    fi
    runs=${OUTPUT_DIR:-experiments/runs}
    [[ $runs = /* ]] || runs=$root/$runs
    read -r -d '' -a words <<<"${OVERRIDES-}" || true # split at white space, nothing else
    arguments=("${command[@]}")
    if [ "${command[0]}" = experiment ]; then
        arguments+=(--output-dir "$runs")
    else
        arguments+=(--config "$PRESET" --run-name "$RUN_NAME")
        if [ -n "${OUTPUT_DIR-}" ]; then
            arguments+=(--output-dir "$runs")
        else
            arguments+=(paths.output="$runs")
        fi
        [ -z "${CHECKPOINT-}" ] || arguments+=(--checkpoint "$CHECKPOINT")
    fi
    arguments+=("${words[@]}" "$@")
}

# Ends this script with modern-llm's own exit code when something stands in the way of the run.
check() {
    [ "${command[0]}" != experiment ] || return 0 # it looks at all arms before it trains one
    say "checking: modern-llm ${arguments[*]}"
    "$python" -m modern_llm "${arguments[@]}" --dry-run "$@" || {
        local code=$?
        say "error: nothing was started, for what stands above; exit code $code"
        record "ended $code"
        exit "$code"
    }
}

# By hand

submit() {
    local script=slurm/${1##*/} word limit i=0 flags=() words=()
    shift
    command -v sbatch >/dev/null 2>&1 ||
        fail 2 "no sbatch on this machine; without SLURM the same is done by modern-llm ${command[*]}"
    for word in "$@"; do
        case $word in
        --*) flags+=("$word") ;;
        -*) fail 2 "$word: write flags of sbatch in their long form, as --name=value" ;;
        *) words+=("$word") ;;
        esac
    done
    limit=${TIME_LIMIT:-${SBATCH_TIMELIMIT:-$(sed -n 's/^#SBATCH --time=//p' "$script")}}
    for word in "${flags[@]}"; do
        case $word in --time=*) limit=${word#*=} ;; esac
    done
    compose "${words[@]}"
    follow
    check --elsewhere --time-limit "$limit"

    CHAIN=${CHAIN:-1}
    need_count CHAIN "how many jobs, one after the other"
    word=${script##*/submit_}
    flags=(--job-name="${word%.sh}-$RUN_NAME" --time="$limit" "${flags[@]}")
    [ -z "${PARTITION-}" ] || flags+=(--partition="$PARTITION")
    [ -z "${ACCOUNT-}" ] || flags+=(--account="$ACCOUNT")
    [ -z "${NODES-}" ] || flags+=(--nodes="$NODES")
    [ -z "${GPUS-}" ] || flags+=(--gpus-per-node="$GPUS" --ntasks-per-node="$GPUS")
    if [ "$CHAIN" -gt 1 ]; then
        flags+=(--dependency=singleton --no-requeue)
        CHAIN_ID=chain-$(date +%s)-$$
        export CHAIN_ID
    fi
    while [ "$((i++))" -lt "$CHAIN" ]; do
        word=$(sbatch --parsable "${flags[@]}" "$script" "${words[@]}")
        say "submitted job $word"
    done
    if [ "${command[0]}" = experiment ]; then # the comparison, by whichever way the array has ended
        flags+=(--array=1 --dependency=afterany:"${word%%;*}" --no-requeue)
        COLLECT=yes sbatch --parsable "${flags[@]}" "$script" "${words[@]}"
    fi
}

# In the job

need_job() {
    local name missing=()
    for name in SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_CPUS_ON_NODE; do
        [ -n "${!name-}" ] || missing+=("$name")
    done
    [ "${#missing[@]}" = 0 ] || fail 2 "SLURM_JOB_ID is set, but ${missing[*]} is not: give this script to sbatch"
    need_count SLURM_JOB_ID "the job's number, which SLURM sets"
    need_count SLURM_JOB_NUM_NODES "nodes of the job, which SLURM sets"
    need_count SLURM_CPUS_ON_NODE "cores of this node, which SLURM sets"
}

# How many tasks, where they meet, and how srun starts them: `launch`.
lay_out() {
    local nodes=$SLURM_JOB_NUM_NODES per_node threads first address
    if [ -z "${GPUS-}" ]; then
        GPUS=${SLURM_GPUS_ON_NODE-}
        [ -n "$GPUS" ] || GPUS=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
    fi
    TASKS=${SLURM_NTASKS:-$nodes}
    need_count TASKS "--ntasks of the job"
    if [ "$GPUS" != 0 ]; then
        need_count GPUS "GPUs of a node"
        TASKS=$((nodes * GPUS))
    fi
    [ -z "${one_task-}" ] || TASKS=1 nodes=1
    per_node=$(((TASKS + nodes - 1) / nodes))
    threads=$((SLURM_CPUS_ON_NODE / per_node))
    [ "$threads" -gt 0 ] || threads=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}

    # A rank that ends first does not end the others, which may still be saving; one that hangs is
    # ended some minutes later.
    launch=(srun --kill-on-bad-exit=0 --wait=300 --nodes="$nodes")
    [ "$TASKS" != "$((nodes * per_node))" ] || launch+=(--ntasks-per-node="$per_node")
    [ "$per_node" -le "$SLURM_CPUS_ON_NODE" ] || launch+=(--overcommit)
    if [ "${command[0]}" = experiment ]; then
        unset MASTER_ADDR MASTER_PORT # its trainings do not meet
    else
        read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        address=$(scontrol --oneliner show node "$first" | sed -nE 's/.* NodeAddr=([^ ]+).*/\1/p')
        export MASTER_ADDR=${MASTER_ADDR:-${address:-$first}}
        export MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
        [ "$TASKS" = 1 ] || [ "${DISTRIBUTED:-ddp}" = config ] ||
            arguments+=(training.distributed="${DISTRIBUTED:-ddp}")
    fi
    case ${LAUNCHER:=srun} in
    srun) launch+=(--ntasks="$TASKS" --cpus-per-task="$threads" "$python") ;;
    torchrun)
        [ "$TASKS" = "$((nodes * per_node))" ] || fail 2 "LAUNCHER=torchrun: $TASKS tasks on $nodes nodes are not equally many on each"
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170} # seconds to save in
        launch+=(--ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$((threads * per_node))" "$python"
            -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$per_node" --max-restarts=0
            --signals-to-handle="$SIGNALS")
        if [ "$nodes" = 1 ]; then
            launch+=(--standalone)
        else
            launch+=(--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT")
        fi
        ;;
    *) fail 2 "LAUNCHER='$LAUNCHER': srun or torchrun" ;;
    esac
}

# What the job, or its chain, has done so far: "starts N", "progress SUM", and "ended CODE" once it did.
record() {
    [ -z "${history-}" ] || printf '%s\n' "$@" >>"$history"
}

last() { [ -z "${history-}" ] || sed -n "s/^$1 //p" "$history" | tail -n 1; }

# What the first stage starts from when the stage `follows` of this run is not finished: its newest
# checkpoint, and the same one in every start of a job.
follow() {
    local folder=$runs/$RUN_NAME/${follows-} newest
    [ -n "${follows-}" ] && [ -z "${CHECKPOINT-}" ] || return 0
    newest=$(last checkpoint)
    if [ -z "$newest" ]; then
        [ ! -e "$folder/final" ] || return 0
        newest=$(find "$folder/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null |
            grep -E '/step-[0-9]{8,}$' | sort | tail -n 1) || true # others were set aside as damaged
        [ -n "$newest" ] || return 0 # the check tells what is missing
        record "checkpoint $newest"
    fi
    say "$follows is not finished: starting from $newest"
    arguments+=(--checkpoint "$newest")
}

# Changes whenever a checkpoint, samples or a result of the run are added.
progress() {
    local found
    # Others may remove what they no longer need meanwhile.
    found=$(cd "$runs" && find . \( -path "./$RUN_NAME/*" -o -path "./${RUN_NAME}_[0-9]*-[0-9]*/*" \) \
        \( -path '*/checkpoints/step-*' -o -name 'samples-*.jsonl' -o -name result.json \) 2>/dev/null) || true
    sort <<<"$found" | cksum
}

count_start() {
    local now
    now=$(progress)
    starts=$(last starts)
    [[ $(last progress) = "$now" && $starts =~ ^[0-9]{1,8}$ ]] || starts=0
    [ "$starts" -lt "$MAX_STARTS" ] || give_up
    starts=$((starts + 1))
    record "progress $now" "starts $starts"
}

give_up() {
    record "ended $GAVE_UP"
    fail "$GAVE_UP" "given up: $starts starts in a row made no progress; the log tells why each ended." \
        "Progress is a new checkpoint: an interval of training.save_every steps must fit in one start." \
        "A new job counts from the beginning"
}

# From the status file, because launchers have exit codes of their own; else that of the launcher.
exit_code_of() {
    local told
    told=$(sed -nE 's/.*"exit_code": *([0-9]+).*/\1/p' "$MODERN_LLM_STATUS_FILE" 2>/dev/null | head -n 1)
    printf '%s\n' "${told:-$1}"
}

conclude() {
    local code=$1
    case $code in
    0)
        record "ended 0"
        say "done"
        exit 0
        ;;
    2 | 3 | 4 | 5 | 6) # would end the same way again
        record "ended $code"
        say "ended with exit code $code; not started again: the message above has the way out"
        exit "$code"
        ;;
    75) say "stopped by a signal after saving" ;;
    *) say "ended with exit code $code (7: a rank died; 1: a bug; 137: killed, as by too little memory)" ;;
    esac
    [ "$starts" -lt "$MAX_STARTS" ] || [ "$(last progress)" != "$(progress)" ] || give_up
    if [ -n "${CHAIN_ID-}" ]; then
        say "the next job of the chain goes on"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "requeued: job $SLURM_JOB_ID goes on in its next start"
    else
        say "this cluster does not requeue jobs: submit the same again, or CHAIN=N of them at once"
    fi
    exit "$code"
}

in_job() {
    local key code=0 ended limit
    need_job
    cd "$root"
    compose "$@"
    lay_out
    key=${CHAIN_ID:-$SLURM_JOB_ID}
    [[ $key =~ ^[A-Za-z0-9-]+$ ]] || fail 2 "CHAIN_ID='$key': letters, digits and '-'"
    MAX_STARTS=${MAX_STARTS:-3}
    need_count MAX_STARTS "starts in a row without progress"
    mkdir -p "$runs/.slurm"
    history=$runs/.slurm/$key
    [ -e "$history" ] || : >"$history"
    ended=$(last ended)
    if [ -n "$ended" ] && [ -n "${CHAIN_ID-}" ]; then
        say "an earlier job of this chain has ended it with exit code $ended"
        exit "$ended"
    fi
    [ -z "$ended" ] || : >"$history" # started once more by hand

    follow
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_WAIT_POLICY=passive
    say "job $SLURM_JOB_ID, started again ${SLURM_RESTART_COUNT:-0} times, on $SLURM_JOB_NODELIST: $TASKS tasks by $LAUNCHER"
    limit=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%l || true)
    check --ranks "$TASKS" --time-limit "${limit:-UNLIMITED}"
    count_start
    export MODERN_LLM_STATUS_FILE=$history.status.json # not the check's
    rm -f "$MODERN_LLM_STATUS_FILE"
    "${launch[@]}" -m modern_llm "${arguments[@]}" || code=$?
    conclude "$(exit_code_of "$code")"
}

# The script's own work: in_job under sbatch (or inside an allocation), else submit.
main() {
    find_python
    if [ -n "${SLURM_JOB_ID-}" ]; then
        shift
        in_job "$@"
    else
        cd "$root"
        submit "$@"
    fi
}
