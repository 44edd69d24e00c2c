"""The command line in this process: flags, exit codes, what is told and what is written."""

import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm import __version__, cli, errors
from modern_llm.alignment.pipeline import AlignmentPipeline
from modern_llm.cli import COMMANDS, main
from modern_llm.config import PipelineConfig, json_schema, list_presets
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.inference.chat import BEGINNINGS, HELP, HELP_PLAIN, QUESTIONS
from modern_llm.models import generate

Captured = pytest.CaptureFixture[str]
Make = Callable[..., Path]


@pytest.fixture
def refused(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command that must be refused; returns its message, and sees that nothing is written."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == code
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: ") and "Traceback" not in told.err
        assert sorted(tmp_path.rglob("*")) == before
        return told.err

    return call


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[PipelineConfig]:
    """Configs that reach the pipeline, which does nothing here."""
    seen: list[PipelineConfig] = []

    def run(self: AlignmentPipeline, stage: str = "all", **_: Any) -> None:
        seen.append(self.config)

    monkeypatch.setattr(AlignmentPipeline, "run", run)
    return seen


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.ConfigError("wrong"), {"exit_code": 2, "reason": "wrong"}),
        (errors.PeerError("lost"), {"exit_code": 7, "reason": "lost"}),
        (None, {"exit_code": 0, "reason": "done"}),
    ],
)
def test_a_status_file_has_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, told: dict[str, Any]
) -> None:
    """Rank 0's own failure stays there when another rank finds it gone afterwards."""
    path = tmp_path / "status" / "run.json"
    monkeypatch.setenv("MODERN_LLM_STATUS_FILE", str(path))

    def run(self: AlignmentPipeline, stage: str = "all", **_: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(AlignmentPipeline, "run", run)
    assert main(["run", "--no-report"]) == told["exit_code"]
    assert json.loads(path.read_text()) == told
    error = errors.PeerError("later")
    assert main(["run", "--no-report"]) == 7
    assert json.loads(path.read_text()) == told


# --- commands that only tell --------------------------------------------------------------------


def test_help_lists_every_command_and_exit_code(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told and entry.summary in told for name, entry in COMMANDS.items())
    assert all(word in told for word in ("2 config", "3 data", "4 checkpoint", "75", "130"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(capsys: Captured, command: str) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"usage: modern-llm {command} " in capsys.readouterr().out


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"modern_llm {__version__}\n"


def test_presets_are_listed_with_what_they_are(capsys: Captured) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_presets()
    assert all(len(line.split()) > 5 for line in lines)


def test_schema_is_printed(capsys: Captured) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


# --- refusals -----------------------------------------------------------------------------------


def test_an_unknown_preset_is_refused_with_a_suggestion(refused: Any) -> None:
    for command in ("run", "speedrun", "plan", "eval", "prepare-data"):
        told = refused(command, "--config", "local-smok")
        assert "unknown preset 'local-smok'; did you mean 'local-smoke'?" in told


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--run-name", "../../x"], "name: run name '../../x': use letters, digits"),
        (["--run-name", "a/b"], "name: run name 'a/b': use letters, digits"),
        (["--run-name", ""], "name: run name '': use letters, digits"),
        (["--run-name", "a\nb"], r"name: run name 'a\nb': use letters, digits"),
        (["--run-name", "/etc"], "name: run name '/etc': use letters, digits"),
        (["--max-steps", "0"], "max_steps=0: Input should be greater than 0"),
        (["--max-steps", "-1"], "max_steps=-1: Input should be greater than 0"),
        (["--checkpoint", "x"], "--checkpoint needs --stage"),
        (["model.n_heads=7"], "d_model=32 is not a multiple of n_heads=7"),
        (["model.norm=rmsnrm"], "unknown norm 'rmsnrm'; did you mean 'rmsnorm'?"),
        (["training.device=tpu9"], "unknown device 'tpu9'"),
        (["whatever"], "override 'whatever': write section.field=value"),
        (["--resume", "--force"], "--resume goes on with a run, --force starts again"),
        (["--resume"], "--resume: no run of this config"),
    ],
)
def test_a_wrong_flag_or_field_is_refused(
    refused: Any, make_tiny: Make, arguments: list[str], rule: str
) -> None:
    config = str(make_tiny())
    assert rule in refused("run", "--config", config, *arguments)


def test_mistakes_of_all_kinds_are_told_in_one_go(refused: Any, make_tiny: Make) -> None:
    config = str(make_tiny({"model.norm": "norm9", "model.position": "pos9", "model.ffn": "ffn9"}))
    overrides = ("training.schedule=zigzag", "sft.training.optimizer=sgdd", "sft.data.0.knd=text")
    told = refused("run", "--config", config, *overrides)
    for name in ("norm 'norm9'", "position encoding 'pos9'", "feed-forward 'ffn9'"):
        assert f"unknown {name}" in told
    assert "unknown schedule 'zigzag'" in told
    assert "unknown optimizer 'sgdd'" in told
    assert "data source 'synthetic': unknown option 'knd'; did you mean 'kind'?" in told


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["report", "nowhere"], 3),
        (["verify", "nowhere"], 3),
        (["generate", "--checkpoint", "nowhere", "hello"], 4),
        (["chat", "--checkpoint", "nowhere"], 4),
        (["inference", "--checkpoint", "nowhere"], 4),
        (["export", "nowhere", "target"], 4),
        (["compare", "--checkpoints", "nowhere"], 4),
        (["eval", "--checkpoint", "nowhere"], 4),
        (["run", "--stage", "sft"], 4),
    ],
)
def test_what_is_not_there_has_its_exit_code(
    refused: Any, make_tiny: Make, arguments: list[str], code: int
) -> None:
    own = ["--config", str(make_tiny())] if arguments[0] in ("compare", "eval", "run") else []
    assert "nowhere" in refused(*arguments, *own, code=code) or arguments[0] == "run"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["run", "--stage", "sfft"],
        ["run", "--no-overwrite", "--force"],
        ["run", "--max-steps", "many"],
        ["generate", "hello"],
    ],
)
def test_usage_is_told(capsys: Captured, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: modern-llm" in capsys.readouterr().err


KINDS = [k for k in vars(errors).values() if isinstance(k, type) and k is not Exception]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_each_error_is_one_message_and_its_code(capsys: Captured, kind: Any) -> None:
    def fail(args: Any) -> int:
        raise kind("what is wrong")

    assert cli._guarded(fail, None) == kind.exit_code  # type: ignore[arg-type]
    assert capsys.readouterr().err == "error: what is wrong\n"


def test_an_interrupt_is_no_bug_and_a_bug_keeps_its_traceback(capsys: Captured) -> None:
    def interrupted(args: Any) -> int:
        raise KeyboardInterrupt

    assert cli._guarded(interrupted, None) == 130  # type: ignore[arg-type]
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli._guarded(lambda args: 1 // 0, None)  # type: ignore[arg-type]


# --- flags and overrides ------------------------------------------------------------------------


def test_flags_and_overrides_come_in_any_order(planned: Any, make_tiny: Make) -> None:
    config = str(make_tiny())
    assert main(["run", "seed=3", "--config", config, "model.bias=true", "--max-steps", "2"]) == 0
    assert main(["run", "--max-steps=2", "model.bias=true", "seed=3", f"--config={config}"]) == 0
    assert planned[0] == planned[1]
    assert (planned[0].seed, planned[0].model.bias, planned[0].max_steps) == (3, True, 2)


def test_a_flag_wins_over_an_override(planned: Any, make_tiny: Make) -> None:
    main(["run", "--config", str(make_tiny()), "name=one", "--run-name", "two"])
    main(["run", "--config", str(make_tiny()), "--run-name", "7"])  # a name, not a number
    assert [config.name for config in planned] == ["two", "7"]


def test_output_dir_moves_everything_that_is_written(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out put"
    flags = ["--output-dir", str(out), "--run-name", "moved", "--max-steps", "1"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    command = ["run", *tiny_run.arguments, "--stage", "pretrain", *flags, cache]

    assert main(command) == 0

    told = capsys.readouterr().out
    assert f"run:    {out / 'moved'}\nreport: {out / 'report' / 'moved_report.md'}\n" in told
    assert {p.name for p in tmp_path.iterdir()} == {"out put", "cache"}
    made = {p.name for p in out.iterdir()}
    assert {"moved", "report"} <= made <= {"moved", "report", "ledger.jsonl", ".lock"}
    facts = json.loads((out / "moved" / "environment.json").read_text())
    assert shlex.split(facts["command"]) == ["modern-llm", *command]  # can be typed again


def test_no_secret_of_the_environment_is_written(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "canary-51c0de"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "USER", "LOGNAME"):
        monkeypatch.setenv(name, f"{canary}-{name}")
    flags = ["--output-dir", str(tmp_path / "out"), "--stage", "pretrain", "--max-steps", "1"]
    assert main(["run", *tiny_run.arguments, *flags, f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert not [path for path in files if canary.encode() in path.read_bytes()]


def test_a_command_reads_its_arguments_from_the_shell(
    monkeypatch: pytest.MonkeyPatch, planned: Any, make_tiny: Make
) -> None:
    config = make_tiny()
    monkeypatch.setattr(sys, "argv", ["run_pipeline.py", "--config", str(config), "seed=9"])
    assert cli.script("run") == 0
    monkeypatch.setattr(sys, "argv", ["modern-llm", "run", "--config", str(config), "seed=8"])
    assert main() == 0
    assert [config.seed for config in planned] == [9, 8]


# --- commands on a finished run -----------------------------------------------------------------


def test_generate_answers_each_prompt(tiny_run: Any, capsys: Captured) -> None:
    final = str(tiny_run.run / "sft" / "final")
    flags = [
        "--checkpoint",
        final,
        "--max-new-tokens",
        "3",
        "--temperature",
        "0",
        "--device",
        "cpu",
    ]
    assert main(["generate", *flags, "one", "two"]) == 0
    first = capsys.readouterr().out
    assert first.count("\n") >= 2
    assert main(["generate", *flags, "one", "two"]) == 0
    assert capsys.readouterr().out == first


def test_a_device_that_is_not_here_is_refused_by_the_flags_name(
    refused: Any, tiny_run: Any
) -> None:
    final = str(tiny_run.run / "sft" / "final")
    told = refused("generate", "--checkpoint", final, "--device", "cuda:99", "hello")
    assert told.startswith("error: --device: 'cuda:99' is not")


def test_generate_continues_plain_text(
    tiny_run: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []

    def kept(model: Any, rows: Any, **options: Any) -> Any:
        read.extend(rows)
        return generate(model, rows, **options)

    monkeypatch.setattr("modern_llm.inference.session.generate", kept)
    final = tiny_run.run / "pretrain" / "final"
    flags = ["--checkpoint", str(final), "--max-new-tokens", "3", "--device", "cpu"]
    assert main(["generate", *flags, "--plain", "Tom has"]) == 0
    assert main(["generate", *flags, "Tom has"]) == 0
    tokenizer = Tokenizer.load(final / "tokenizer.json")
    text = tokenizer.encode("Tom has")
    plain, asked = read
    assert plain == [tokenizer.bos_id, *text]
    assert asked == [tokenizer.bos_id, tokenizer.user_id, *text, tokenizer.assistant_id]


def test_chat_answers_until_the_input_ends(
    tiny_run: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    final = str(tiny_run.run / "sft" / "final")
    assert main(["chat", "--checkpoint", final, "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert "Traceback" not in capsys.readouterr().err


INFERENCE = ["--device", "cpu", "--max_new_tokens", "4", "--top_k", "10", "--top_p", "0.9"]


def test_inference_in_a_script(tiny_run: Any, cli: Callable[..., Any]) -> None:
    """The facts, one completion a prompt, and nothing is asked for; a run is taken for its last."""
    prompts = ["--prompt", "One", "--prompt", "two?"]
    done = cli("scripts/inference.py", "--checkpoint", tiny_run.run, *INFERENCE, *prompts)
    assert done.returncode == 0, done.stderr
    assert f"{tiny_run.run}: taking dpo/final" in done.stderr
    for fact in ("1L-2H-32D-RoPE-RMS-SwiGLU-PreNorm", "dpo, step 3", "synthetic with fingerprint"):
        assert fact in done.stdout
    assert re.search(r"parent  sft [0-9a-f]{12}\n", done.stdout)
    assert re.findall(r"^> (.*)$", done.stdout, re.M) == ["One", "two?"]
    assert done.stdout.count("first after") == 2


@pytest.mark.parametrize(
    ("stage", "prompts", "told"),
    [("pretrain", BEGINNINGS, HELP_PLAIN), ("sft", QUESTIONS, HELP)],
)
def test_inference_goes_by_the_stage(
    tiny_run: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch,
    stage: str, prompts: tuple[str, ...], told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nclear\nhello\n"))
    flags = [flag.replace("_", "-") for flag in INFERENCE]
    assert main(["inference", "--checkpoint", str(tiny_run.run / stage), *flags]) == 0
    out = capsys.readouterr().out
    assert tuple(re.findall(r"^> (.*)$", out, re.M)) == prompts
    samples, dialogue = out.split(told)
    assert samples.count("first after") == len(prompts)
    assert dialogue.count("first after") == 2 and "(begun anew)" in dialogue


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--prompt", "One"], 130)])
def test_ctrl_c_while_samples_are_drawn(
    tiny_run: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], code: int,
) -> None:  # fmt: skip
    """At a terminal the dialogue begins; a script is told that it is not done."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modern_llm.inference.chat.timed_reply", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    command = ["inference", "--checkpoint", str(tiny_run.run), "--device", "cpu", *arguments]
    assert main(command) == code
    assert ("(stopped)" in capsys.readouterr().out) == (code == 0)


def test_inference_refuses_before_it_shows(refused: Any, tiny_run: Any) -> None:
    checkpoint = ["inference", "--checkpoint", str(tiny_run.run / "sft" / "final")]
    told = refused(*checkpoint, "--device", "cpu", "--max-new-tokens", "999")
    assert "max_new_tokens=999 must be from 1 to 124" in told
    told = refused(*checkpoint, "--device", "cpu", "--temperature", "-1")
    assert "temperature=-1.0 must be 0 or more" in told
    verifier = str(tiny_run.run / "verifier" / "final")
    told = refused("inference", "--checkpoint", verifier, "--device", "cpu")
    assert "is a verifier" in told


def test_export_is_protected(tiny_run: Any, tmp_path: Path, capsys: Captured) -> None:
    target = tmp_path / "exported"
    command = ["export", str(tiny_run.run / "dpo" / "final"), str(target)]
    assert main(command) == 0
    assert f"{target}: LlamaForCausalLM; logits differ by at most" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in target.iterdir()}
    assert main([*command, "--no-overwrite"]) == 0
    assert capsys.readouterr().out == f"{target} exists; left as it is\n"
    assert {p: p.stat().st_mtime_ns for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]


def test_data_is_prepared_ahead(make_tiny: Make, tmp_path: Path) -> None:
    config = str(make_tiny())
    assert main(["prepare-data", "--config", config]) == 0
    stores = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")}
    assert len(stores) >= 2
    assert not (tmp_path / "runs").exists()
    assert main(["run", "--config", config, "--stage", "pretrain", "--max-steps", "1"]) == 0
    prepared = {p for p in tmp_path.glob("cache/stores/*/manifest.json")}
    assert prepared == set(stores)  # training found them
    assert {p: p.stat().st_mtime_ns for p in stores} == stores


def test_verify_says_what_is_wrong(tiny_run: Any, tmp_path: Path, capsys: Captured) -> None:
    assert main(["verify", str(tiny_run.run)]) == 0
    assert "0 problems" in capsys.readouterr().out
    run = shutil.copytree(tiny_run.run, tmp_path / "tiny")
    with (run / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 1, "loss": 0.0}\n')
    assert main(["verify", str(run)]) == 1
    assert "problems" in capsys.readouterr().out


def test_report_is_rebuilt_and_left_alone(tiny_run: Any, tmp_path: Path, capsys: Captured) -> None:
    command = ["report", str(tiny_run.run), "--report-dir", str(tmp_path)]
    assert [main(command), main([*command, "--no-overwrite"])] == [0, 0]
    assert len(list(tmp_path.glob("*.md"))) == 1
    assert "left as it is" in capsys.readouterr().out


def test_a_finished_run_is_not_computed_again(
    tiny_run: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modern_llm.training.trainer import Trainer

    def no_step(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "train_step", no_step)
    before = {p: p.stat().st_mtime_ns for p in tiny_run.run.rglob("*") if p.name != ".lock"}
    assert main(["run", *tiny_run.arguments]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert str(tiny_run.run) in capsys.readouterr().out


def test_a_closed_pipe_is_no_error() -> None:
    """``modern-llm schema | head -1``: the reader goes away in the middle of the output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "modern_llm", "schema"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait(30) in (0, -signal.SIGPIPE)
    assert "Traceback" not in told
