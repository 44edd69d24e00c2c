"""Every command that the README and the documentation show works as shown.

Cheap ones are run, in an empty folder in which the tiny run stands for ``local-smoke``; those that
train are planned with ``--dry-run``; the flags of all are parsed. A command of a kind that nobody
has thought of fails.
"""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from modern_llm import errors
from modern_llm.cli import COMMANDS, main, parser_of
from modern_llm.config import list_presets, load_config, load_study
from modern_llm.config.train_flags import sections
from modern_llm.data.sources.hub import HubSet

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RUN = "experiments/runs/local-smoke"
PLANNED = ("run", "speedrun", "train", "plan", "eval")
PLUGINS = re.compile(r"<!-- file: (\w+\.py) -->\n```python\n(.*?)```", re.DOTALL)
CHEAP = ("presets", "schema", "report", "verify", "generate", "chat", "inference", "--help")
PARSED_ONLY = {
    "compare": "evaluates; tests/alignment runs it",
    "compare-architectures": "needs results of experiments; tests/experiments runs it",
    "experiment": "trains; tests/experiments runs it",
    "experiment-sinks": "trains; tests/experiments runs it",
    "export": "imports transformers; tests/interop runs it",
    "prepare-data": "tokenizes a whole data set; tests/data runs it",
}
NOT_RUN = {
    "bash speedrun.sh test": "it is the command that runs this test",
    "bash speedrun.sh setup": "it has been run: the package is here",
    "source .venv/bin/activate": "changes the shell only",
    "git checkout": "changes the working tree",
    "git clone": "needs the network",
    "torchrun": "tests/distributed runs the same with two processes",
    "sbatch": "tests/slurm runs every script",
    "bash slurm/": "tests/slurm runs every script",
}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def words_of(line: str) -> list[str]:
    """Words of a command, without comment and without variables set in front of it."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


LINES = dict.fromkeys(
    shlex.join(words)
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if (words := words_of(line))
)


def arguments(line: str) -> list[str] | None:
    """The same command as arguments of ``modern-llm``, if it is one of those."""
    words = shlex.split(line)
    if words[0] == "modern-llm":
        return words[1:]
    if words[0] == "python" and words[1].startswith("scripts/"):
        called = re.search(r'script\("([\w-]+)"\)', (ROOT / words[1]).read_text())
        assert called is not None, f"{words[1]} calls no command"
        return [called[1], *words[2:]]
    if words[:2] == ["bash", "speedrun.sh"] and words[2:] and words[2] not in ("test", "setup"):
        return ["speedrun", "--config", *words[2:]]
    return None


OURS = {line: found for line in LINES if (found := arguments(line)) is not None}
OTHERS = [line for line in LINES if line not in OURS]


def test_the_two_commands_are_there() -> None:
    assert {"bash speedrun.sh local-smoke", "bash speedrun.sh test"} <= LINES.keys()
    assert len(OURS) > 15


@pytest.mark.parametrize("line", OURS)
def test_flags_are_accepted(line: str) -> None:
    command, *rest = OURS[line]
    assert command in (*PLANNED, *CHEAP, *PARSED_ONLY)
    if command in COMMANDS:
        _, unknown = parser_of(command).parse_known_intermixed_args(rest)
        assert not unknown or COMMANDS[command].takes_flags


@pytest.fixture
def place(tmp_path: Path, tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty folder where the tiny run has the name of the run that the pages speak of."""
    (tmp_path / RUN).parent.mkdir(parents=True)
    (tmp_path / RUN).symlink_to(tiny_run.run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/quit\n"))
    monkeypatch.setattr(HubSet, "check", lambda *_: None)  # the network is not what is tested
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MODERN_LLM_DATA", raising=False)
    return tiny_run


@pytest.mark.parametrize("line", [line for line, a in OURS.items() if a[0] in PLANNED])
def test_what_trains_can_be_planned(
    line: str, place: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = OURS[line] if "--dry-run" in OURS[line] else [*OURS[line], "--dry-run"]
    preset = argv[1] if argv[0] == "train" else argv[argv.index("--config") + 1]
    argv = [str(ROOT / word) if word.startswith("configs/") else word for word in argv]
    for name, text in PLUGINS.findall((ROOT / "docs" / "adding_a_component.md").read_text()):
        Path(name).write_text(text)
    if any(word.startswith(RUN) for word in argv):
        argv = [str(place.config) if word == preset else word for word in argv]
    argv = [word for word in argv if word != "--dry-run" or argv[0] != "plan"]
    if "--plugin" in argv:  # registers for the whole process, so it has one of its own
        program = [sys.executable, "-m", "modern_llm", *argv]
        done = subprocess.run(program, capture_output=True, text=True, timeout=60)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code = main(argv)
        out, err = capsys.readouterr()
    assert "M parameters" in out, err
    if preset == "local-smoke":
        assert code == 0, out
    else:  # a GPU, or GPT-2's tokenizer, may not be here; the plan says so
        assert code in (0, 2, 3)
        assert (code == 0) == ("ready: nothing stands in the way" in out)
    left = {p.name for p in Path.cwd().iterdir() if p.suffix != ".py"} - {"__pycache__"}
    assert left == {"experiments"}, "a plan writes nothing"


@pytest.mark.parametrize("line", [line for line, a in OURS.items() if a[0] in CHEAP])
def test_what_is_cheap_is_run(line: str, place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(OURS[line])
    except SystemExit as end:  # --help
        code = int(end.code or 0)
    told = capsys.readouterr()
    assert code == 0, told.err
    assert told.out  # a tiny model may answer with an empty line


@pytest.mark.parametrize("line", OTHERS)
def test_other_commands(line: str) -> None:
    reason = next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)
    if reason is not None:
        pytest.skip(reason)
    words = shlex.split(line)
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
        return
    is_cheap = words[:2] in (["python", "-c"], ["python", "docs/links.py"]) or words[2:] == []
    assert is_cheap, f"nobody has said how to check: {line}"
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page, "json")])
def test_config_files_shown_are_valid(block: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(block)
    shown = json.loads(block)
    if "arms" in shown:
        assert load_study(str(path)).changes().keys() == shown["arms"].keys()
        return
    config = load_config(path)
    assert config.name == "mine"
    assert config.model.n_layers == shown["model"]["n_layers"]


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page, "yaml")])
def test_flat_files_shown_are_valid(block: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    shown, config = yaml.safe_load(block), load_config(path, rewrite=sections)
    assert (config.name, config.model.d_model) == ("mine", shown["n_embd"])


def test_every_command_and_preset_is_told() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if not re.search(rf"`(modern-llm )?{name}`", readme)]
    assert not missing
    assert not [name for name in list_presets() if f"`{name}`" not in readme]


@pytest.mark.parametrize("page", ["README.md", "docs/pipeline.md"])
def test_exit_codes_are_those_of_the_errors(page: str) -> None:
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    codes = {kind.exit_code for kind in kinds} - {1}
    told = re.findall(r"^\| (\d+) \|", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert set(map(int, told)) - {1} == codes | {0, 130}


def test_every_reason_is_needed() -> None:
    assert {a[0] for a in OURS.values()} >= PARSED_ONLY.keys()
