"""Set-up: speedrun.sh with a fake interpreter, pinned versions, and what ``--help`` imports."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest

from modern_llm.config import list_presets

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="no bash")

# Stands for a Python >= 3.11: "makes" a venv with itself inside, writes what pip is asked to do
# to pip.log, and fails where fail.txt says so.
FAKE_PYTHON = """\
#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
*"-m venv"*)
    target=${@: -1}
    rm -rf "$target"; mkdir -p "$target/bin"; cp "$0" "$target/bin/python" ;;
*"-m pip install"*)
    echo install >> "$PIP_LOG"
    sleep "${PIP_SECONDS:-0}"
    if [ -e "$PIP_LOG.fail" ]; then echo "no such package" >&2; exit 1; fi ;;
*speedrun_pipeline*) echo "pipeline $*" ;;
*"-m pytest"*) echo "tests $* threads=$OMP_NUM_THREADS" ;;
esac
"""
OLD_PYTHON = "#!/bin/bash\nexit 1\n"  # is not new enough for the check


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with the files that set-up reads, in a folder with a space in its name."""
    clone = tmp_path / "a clone"
    clone.mkdir()
    for name in ("speedrun.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "configs", clone / "configs")
    script(tmp_path / "fake" / "python", FAKE_PYTHON)
    return clone


def environment(clone: Path, **variables: str) -> dict[str, str]:
    log = clone.parent / "pip.log"
    fake = clone.parent / "fake" / "python"
    own = {"PYTHON": str(fake), "PIP_LOG": str(log), "SYSTEM_PACKAGES": "no"}
    return {**os.environ, **own, **variables}


def speedrun(clone: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BASH), str(clone / "speedrun.sh"), *args],
        env=environment(clone, **variables),
        cwd=clone.parent,
        capture_output=True,
        text=True,
        timeout=30,
    )


def installs(clone: Path) -> int:
    log = clone.parent / "pip.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@needs_bash
def test_without_argument_it_lists_the_presets(clone: Path) -> None:
    shown = speedrun(clone)
    assert shown.returncode == 0
    listed = re.findall(r"^  (\S+) ", shown.stdout.partition("presets")[2], re.M)
    assert listed == sorted(list_presets())
    assert not (clone / ".venv").exists()


@needs_bash
def test_unknown_preset_is_refused_before_anything_is_installed(clone: Path) -> None:
    refused = speedrun(clone, "local-smok")
    assert refused.returncode == 2
    assert "local-smok" in refused.stderr and "local-smoke" in refused.stderr
    assert not (clone / ".venv").exists()


@needs_bash
def test_set_up_is_done_once_and_again_when_the_requirements_change(clone: Path) -> None:
    first = speedrun(clone, "local-smoke", "training.lr=1e-3")
    assert first.returncode == 0, first.stderr
    assert "speedrun_pipeline.py --config local-smoke training.lr=1e-3" in first.stdout
    begin = time.perf_counter()
    again = speedrun(clone, "test", "-k", "name")
    assert time.perf_counter() - begin < 1
    assert "-k name threads=1" in again.stdout
    assert installs(clone) == 1
    with (clone / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    speedrun(clone, "setup")
    assert installs(clone) == 2


@needs_bash
def test_config_path_is_taken_from_where_the_user_stands(clone: Path) -> None:
    (clone.parent / "mine.json").write_text("{}")
    shown = speedrun(clone, "mine.json")
    assert f"--config {clone.parent / 'mine.json'}" in shown.stdout


@needs_bash
def test_failed_install_says_what_to_do_and_is_not_taken_for_done(clone: Path) -> None:
    marker = clone.parent / "pip.log.fail"
    marker.touch()
    failed = speedrun(clone, "setup")
    assert failed.returncode == 1
    assert "no such package" in failed.stderr
    assert "requirements.txt" in failed.stderr and "start the same command again" in failed.stderr
    marker.unlink()
    assert speedrun(clone, "setup").returncode == 0
    assert installs(clone) == 2


@needs_bash
def test_interpreter_that_is_too_old_is_named(clone: Path) -> None:
    old = script(clone.parent / "old" / "python3", OLD_PYTHON)
    refused = speedrun(clone, "setup", PYTHON=str(old))
    assert refused.returncode == 1
    assert str(old) in refused.stderr and "3.11" in refused.stderr


@needs_bash
def test_no_interpreter_at_all_says_how_to_get_one(clone: Path) -> None:
    tools = clone.parent / "tools"
    tools.mkdir()
    for name in ("cat", "cksum", "dirname", "basename", "sed", "sort", "grep", "rm", "bash"):
        (tools / name).symlink_to(str(shutil.which(name)))
    refused = speedrun(clone, "setup", PYTHON="", PATH=str(tools))
    assert refused.returncode == 1
    assert "python3-venv" in refused.stderr


@needs_bash
@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock")
def test_two_at_once_install_once(clone: Path) -> None:
    command = [str(BASH), str(clone / "speedrun.sh"), "setup"]
    both = [subprocess.Popen(command, env=environment(clone, PIP_SECONDS="0.5")) for _ in range(2)]
    assert [process.wait(timeout=30) for process in both] == [0, 0]
    assert installs(clone) == 1


@needs_bash
@pytest.mark.parametrize(("user", "wanted"), [("0", True), ("1000", False)])
def test_root_gets_what_the_tests_of_slurm_need(user: str, wanted: bool, clone: Path) -> None:
    """With an apt-get that has no network, the tests are run all the same."""
    tools = clone.parent / "tools"
    script(tools / "id", f"#!/bin/bash\necho {user}\n")
    script(tools / "apt-get", f'#!/bin/bash\necho "$*" >>"{tools}/asked"; [ "$1" = update ]\n')
    for name in ("bash", "cat", "cksum", "dirname", "flock"):
        (tools / name).symlink_to(str(shutil.which(name)))
    own = {"PATH": str(tools), "SYSTEM_PACKAGES": "yes"}
    (clone / ".venv").mkdir()
    shutil.copytree(clone.parent / "fake", clone / ".venv" / "bin")
    done = speedrun(clone, "test", **own)
    if any(shutil.which(name, path="/usr/sbin") for name in ("munged", "sbatch")):
        wanted_packages = "shellcheck"
    else:
        wanted_packages = "slurm-wlm munge shellcheck"
    asked = (tools / "asked").read_text() if (tools / "asked").exists() else ""
    assert ("--no-install-recommends" in asked) is wanted
    assert (wanted_packages in asked) is wanted
    assert "tests " in done.stdout, done.stderr


def pinned() -> dict[str, str]:
    lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x[:1] != "#"]
    assert lines[-1] == "-e ."
    return {canonical(name): version for name, version in (x.split("==") for x in lines[:-1])}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_inside_its_range() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pinned()
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        version = versions[canonical(requirement.name)]
        assert requirement.specifier.contains(version), f"{text} excludes the pinned {version}"


def test_package_and_changelog_tell_one_version() -> None:
    import modern_llm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert modern_llm.__version__ == project["version"]
    assert f"\n## {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


HEAVY = "torch numpy transformers datasets tokenizers accelerate evaluate matplotlib safetensors"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["run", "--help"], 0), (["run", "--config", "no-such-preset"], 2)],
)
def test_help_and_a_refused_config_import_nothing_heavy(arguments: list[str], code: int) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from modern_llm.cli import main
        try:
            code = main({arguments!r})
        except SystemExit as stop:
            code = stop.code
        heavy = sorted(set({HEAVY.split()!r}) & sys.modules.keys())
        print("heavy:", *heavy, file=sys.stderr)
        sys.exit(code or 0)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "heavy:", done.stderr


def test_models_import_torch_only() -> None:
    program = (
        "import sys, modern_llm.models; "
        f"print(*sorted((set({HEAVY.split()!r}) - {{'torch', 'numpy'}}) & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
