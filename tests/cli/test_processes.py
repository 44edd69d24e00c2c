"""The command line as a process of its own: speed, imports, and a machine that has nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = [
    *("torch", "numpy", "transformers", "datasets", "tokenizers", "matplotlib", "rich"),
    *("accelerate", "evaluate", "safetensors"),
]

LOOK = """
import contextlib, io, json, runpy, sys
from pathlib import Path

def told(call):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = call()
        except SystemExit as done:
            code = done.code
    return [code, out.getvalue()]

def script(path):
    sys.argv = [path, "--help"]
    runpy.run_path(path, run_name="__main__")

from modern_llm.cli import COMMANDS, main
found = {f"{n} --help": told(lambda: main([n, "--help"])) for n in COMMANDS}
found["--help"] = told(lambda: main(["--help"]))
found["presets"] = told(lambda: main(["presets"]))
found["schema"] = told(lambda: main(["schema"]))
found["refused"] = told(lambda: main(["run", "--config", "local-smok"]))
found["bad field"] = told(lambda: main(["run", "model.d_modl=3", "training.lr=-1"]))
found |= {p.name: told(lambda: script(str(p))) for p in sorted(Path("scripts").glob("*.py"))}
print(json.dumps([found, [name for name in %r if name in sys.modules]]))
"""


def test_help_and_refusals_import_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK % HEAVY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    assert {code for name, (code, _) in found.items() if name not in ("refused", "bad field")} == {
        0
    }
    scripts = {name: text for name, (_, text) in found.items() if name.endswith(".py")}
    assert {"run_pipeline.py", "speedrun_pipeline.py", "evaluate_and_compare.py"} <= set(scripts)
    for name, text in scripts.items():
        assert text.startswith(f"usage: {name} ")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--config", "nope"]])
def test_help_and_a_refused_config_answer_in_under_a_second(arguments: list[str]) -> None:
    """In processor time, so that a busy machine does not decide."""
    spent = []
    for _ in range(2):
        before = os.times()
        subprocess.run([sys.executable, "-m", "modern_llm", *arguments], capture_output=True)
        now = os.times()
        spent.append(now.children_user + now.children_system)
        spent[-1] -= before.children_user + before.children_system
    assert min(spent) < 1


def test_a_refusal_is_one_message_on_standard_error(cli: Any, tmp_path: Path) -> None:
    done = cli("run", "--config", "local-smok", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: unknown preset")
    done = cli(str(ROOT / "scripts" / "run_pipeline.py"), "--config", "local-smok", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown preset 'local-smok'; did you mean 'local-smoke'?")
    assert not list(tmp_path.iterdir())


TACC = """
import sys
from modern_llm.cli import main
codes = [main(["plan", "--config", "tacc"])]
print("=====", file=sys.stdout, flush=True)
codes.append(main(["run", "--stage", "dpo", "--config", "tacc"]))
print(codes, file=sys.stdout)
"""


def test_the_flagship_on_a_bare_machine(tmp_path: Path) -> None:
    """No GPU, no data, no hub, no checkpoint: the whole plan, and one error that says all that."""
    empty = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    own = {k: v for k, v in os.environ.items() if k != "MODERN_LLM_DATA"}
    run = tmp_path / "here"
    run.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TACC], cwd=run, env={**own, **empty, "COLUMNS": "120"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    plan, _, rest = done.stdout.partition("=====\n")
    assert rest.splitlines()[-1] == "[2, 2]", done.stderr

    millions = re.search(r"tacc: ([\d.]+) M parameters", plan)
    assert millions is not None and 0.97 * 253 < float(millions.group(1)) < 1.03 * 253
    for word in ("pretrain", "sft", "dpo", "verifier", "FLOPs", "memory:", "disk:"):
        assert word in plan
    problems = plan.split("stands in the way:\n")[1].splitlines()
    assert all(
        "'cuda' is not available here" in p or "reach the hub" in p or "data" in p for p in problems
    ), problems
    missing = {"wikitext", "TinyStories", "alpaca", "hh-rlhf", "gsm8k", "gpt2"}
    assert all(any(name in p for p in problems) for name in missing)

    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "'cuda' is not available here" in done.stderr
    assert "Anthropic/hh-rlhf: the train split is not below MODERN_LLM_DATA" in done.stderr
    assert "stage dpo starts from the sft checkpoint" in done.stderr
    assert "or give --checkpoint PATH" in done.stderr
    assert "alpaca" not in done.stderr  # not asked for by this stage
    assert not list(run.iterdir())
