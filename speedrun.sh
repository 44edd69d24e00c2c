#!/usr/bin/env bash
# One command from a fresh clone to a result. Makes .venv and installs when that is not done yet.
#
#   bash speedrun.sh                         list the presets
#   bash speedrun.sh PRESET [overrides]      run the whole pipeline: bash speedrun.sh local-smoke
#   bash speedrun.sh test [pytest options]   run the tests
#   bash speedrun.sh setup                   make .venv and install, nothing else
#
# PYTHON=/path/to/python chooses the interpreter that .venv is made with (3.11 or newer).
# As root on Debian or Ubuntu, "test" also installs what the tests of slurm/ need (SYSTEM_PACKAGES=no: not).
set -euo pipefail

caller_dir=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/.modern_llm-installed

say() { printf 'speedrun: %s\n' "$*" >&2; }

fail() {
    say "error: $1"
    shift
    for line in "$@"; do say "$line"; done
    exit 1
}

preset_names() {
    local file name
    for file in configs/*.json configs/arch/*.json; do
        [ -f "$file" ] || continue
        name=$(basename "${file%.*}")
        case $name in schema | _*) ;; *) printf '%s\n' "$name" ;; esac
    done | sort
}

describe() { # the first description in a config file, if any
    sed -nE 's/^ *"?description"?: *"?([^"]*)"?,?$/\1/p' configs/"$1".json configs/arch/"$1".json 2>/dev/null | head -n 1
}

usage() {
    printf 'usage: bash speedrun.sh PRESET [section.field=value ...]\n'
    printf '       bash speedrun.sh test [pytest options]\n'
    printf '       bash speedrun.sh setup\n\npresets (configs/, or a path to a .json or .yaml):\n'
    preset_names | while read -r name; do printf '  %-13s %s\n' "$name" "$(describe "$name")"; done
}

is_new_enough() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python3.14 python; do
        if command -v "$name" >/dev/null 2>&1 && is_new_enough "$name"; then
            command -v "$name"
            return
        fi
        [ "$name" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not Python >= 3.11 with venv"
    done
    fail "no Python >= 3.11 with the venv module was found" \
        "install one (Debian, Ubuntu: apt-get install python3 python3-venv; conda: conda create" \
        "-n py312 python=3.12) and start again, or name it: PYTHON=/path/to/python3.12 bash speedrun.sh"
}

# What the installation in .venv depends on: the requirements, the package's metadata, its place.
wanted_stamp() {
    printf '%s\n' "$root"
    cksum requirements.txt pyproject.toml
}

is_installed() {
    [ -x "$python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_stamp)" ]
}

install_all() {
    local base
    rm -f "$stamp" # a half-finished installation is never taken for a whole one
    if ! { [ -x "$python" ] && is_new_enough "$python"; }; then
        base=$(find_python)
        say "making .venv with $base"
        "$base" -m venv --clear "$venv" || fail "making .venv with $base failed (see above)" \
            "free some disk space or choose another interpreter: PYTHON=... bash speedrun.sh"
    fi
    say "installing requirements.txt into .venv (once; some minutes on a slow connection)"
    "$python" -m pip install --disable-pip-version-check --progress-bar off -q -r requirements.txt ||
        fail "pip could not install requirements.txt (its message is above)" \
            "usual causes: no network, a full disk, or a proxy that pip does not know (PIP_INDEX_URL)" \
            "start the same command again: it goes on with what is there already" \
            "to start from nothing: rm -rf $venv"
    wanted_stamp >"$stamp"
}

set_up() {
    ! is_installed || return 0
    exec 9<"$root"
    if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
        say "another speedrun.sh is installing into .venv; waiting for it"
        flock 9
    fi
    is_installed || (install_all 9<&-) || exit 1
    exec 9<&-
}

# A SLURM of this machine's own, and shellcheck; without them their tests are skipped and say so.
install_test_tools() {
    local missing=() pair
    for pair in sbatch:slurm-wlm munged:munge shellcheck:shellcheck; do
        PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair#*:}")
    done
    [ "${#missing[@]}" -gt 0 ] && [ "${SYSTEM_PACKAGES:-yes}" != no ] || return 0
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || return 0
    say "installing ${missing[*]} for the tests of slurm/"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >/dev/null ||
        say "apt-get could not install them (its message is above): their tests will be skipped"
}

run_tests() {
    # Workers of one thread each: two processes of two threads on two cores stand in each other's way.
    export OMP_NUM_THREADS=1
    exec "$python" -m pytest -q -n auto --maxprocesses 8 --dist worksteal "$@"
}

run_preset() {
    local config=$1
    shift
    if [ -f "$caller_dir/$config" ]; then
        config=$caller_dir/$config
    elif ! [ -f "$config" ] && ! preset_names | grep -qxF -- "$config"; then
        say "error: no preset and no file '$config'"
        usage >&2
        exit 2
    fi
    set_up
    exec "$python" scripts/speedrun_pipeline.py --config "$config" "$@"
}

case "${1-}" in
"" | -h | --help | list) usage ;;
setup) set_up ;;
test)
    shift
    set_up
    install_test_tools
    run_tests "$@"
    ;;
*) run_preset "$@" ;;
esac
