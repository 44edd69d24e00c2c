"""The submit scripts without a SLURM: what they are, what they refuse, what is never run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMON = ROOT / "slurm" / "common.sh"
SCRIPTS = sorted((ROOT / "slurm").glob("submit_*.sh"))
SKIPPED = (".venv", ".git", "build", "dist", "runs", "node_modules")
SHELL_FILES = sorted(
    path
    for pattern in ("*.sh", ".ci/run", "*/*.sh", "*/*/*.sh")
    for path in ROOT.glob(pattern)
    if not set(path.relative_to(ROOT).parts) & set(SKIPPED)
)
PRETRAIN = ROOT / "slurm" / "submit_pretrain_only.sh"
DOCUMENTED = re.findall(r"[A-Z][A-Z_]{3,}", COMMON.read_text().partition("\nset -euo")[0])
OF_SLURM = (
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_ON_NODE",
    "SLURM_NTASKS", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID",
    "SLURM_ARRAY_TASK_COUNT", "SLURM_SUBMIT_DIR",
)  # fmt: skip
JOB = {
    **{"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"},
    **{"SLURM_CPUS_ON_NODE": "2", "SLURM_NTASKS": "2"},
}
# Stands for every program that the scripts start, and says how it was called.
TOOL = """\
#!/bin/bash
printf '%s' "${0##*/}" >>"$CALLS"; printf '\\t%s' "$@" >>"$CALLS"; echo >>"$CALLS"
case ${0##*/} in scontrol) echo "NodeName=n1 NodeAddr=here Port=1" ;; sbatch) echo 18 ;; esac
"""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_files_pass_shellcheck(path: Path) -> None:
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_files_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_shell_files_are_looked_at() -> None:
    assert {ROOT / "speedrun.sh", ROOT / ".ci" / "run", COMMON, *SCRIPTS} <= set(SHELL_FILES)
    assert len(SCRIPTS) == 6


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_saves_ahead_of_its_limit_and_keeps_its_log(path: Path) -> None:
    asked = re.findall(r"^#SBATCH --(.*)$", path.read_text(), re.M)
    signal = next(word for word in asked if word.startswith("signal=USR1@"))
    assert int(signal.partition("@")[2]) >= 120, "SLURM may send it 60 s early"
    assert {"requeue", "open-mode=append"} <= set(asked)
    assert not [word for word in asked if re.match("(account|partition|mail|chdir)", word)]


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment in which all that a script starts is `TOOL`."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("srun", "scontrol", "squeue", "sbatch", "nvidia-smi", "python-of-it"):
        (folder / name).write_text(TOOL)
        (folder / name).chmod(0o755)
    own = ("SLURM", "SBATCH", "MODERN_LLM", "HF_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(own) and k not in DOCUMENTED}
    env |= {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    return env | {"PYTHON": "python-of-it", "OUTPUT_DIR": str(tmp_path / "out")}


def start(
    script: Path, env: dict[str, str], *words: str, cwd: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(script), *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=30
    )


def test_each_variable_of_slurm_that_is_missing_is_named(tools: dict[str, str]) -> None:
    refused = start(PRETRAIN, {**tools, "SLURM_JOB_ID": "17", "SLURM_CPUS_ON_NODE": "2"})
    assert refused.returncode == 2
    assert "SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES is not" in refused.stderr
    assert "give this script to sbatch" in refused.stderr


def test_what_is_not_here_is_told(tools: dict[str, str], tmp_path: Path) -> None:
    refused = start(PRETRAIN, {**tools, "PYTHON": "no-such-python"})
    assert refused.returncode == 2 and "bash speedrun.sh setup" in refused.stderr
    (tmp_path / "tools" / "sbatch").unlink()
    path = os.pathsep.join((str(tmp_path / "tools"), "/bin"))
    if shutil.which("sbatch", path=path) is None:
        refused = start(PRETRAIN, {**tools, "PATH": path})
        assert refused.returncode == 2 and "no sbatch on this machine" in refused.stderr


@pytest.mark.parametrize(
    ("variables", "words", "message"),
    [
        ({"SLURM_JOB_ID": "x"}, (), "SLURM_JOB_ID='x' is not a count"),
        ({"LAUNCHER": "mpirun"}, (), "srun or torchrun"),
        ({"MAX_STARTS": "0"}, (), "MAX_STARTS='0' is not a count"),
        ({"GPUS": "all"}, (), "GPUS='all' is not a count"),
    ],
)
def test_a_wrong_variable_is_told(
    variables: dict[str, str], words: tuple[str, ...], message: str, tools: dict[str, str]
) -> None:
    refused = start(PRETRAIN, {**tools, **JOB, **variables}, *words)
    assert refused.returncode == 2
    assert message in refused.stderr


def test_flags_of_sbatch_in_short_form_are_refused(tools: dict[str, str]) -> None:
    refused = start(PRETRAIN, tools, "-t", "10")
    assert refused.returncode == 2 and "--name=value" in refused.stderr


ATTACKS = (
    "SHLVL[$(touch {canary})]",  # what bash runs inside of arithmetic
    "x $(touch {canary}) `touch {canary}` ' ; touch {canary} ; '",
    '" ; touch {canary} ; "\ntouch {canary}',
)


@pytest.mark.parametrize("name", [*dict.fromkeys(DOCUMENTED), *OF_SLURM, "words"])
def test_nothing_in_a_variable_is_run(name: str, tools: dict[str, str], tmp_path: Path) -> None:
    canary, calls, clone = tmp_path / "canary", tmp_path / "calls", tmp_path / "clone"
    shutil.copytree(ROOT / "slurm", clone / "slurm")  # a folder that a variable names is made there
    for attack in ATTACKS:
        text = attack.format(canary=canary)
        for job in (JOB, {}):
            env = {**tools, **job} | ({} if name == "words" else {name: text})
            words = (text,) if name == "words" else ()
            for script in ("submit_pretrain_only.sh", "submit_sweep.sh"):
                start(clone / "slurm" / script, env, *words, cwd=clone)
                assert not canary.exists(), (name, text, script)
    if name in ("RUN_NAME", "CHECKPOINT", "DISTRIBUTED"):
        assert "; touch" in calls.read_text(), "it was passed on as a word"
