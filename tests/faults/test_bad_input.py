"""Every kind of bad input ends in one clear message and its exit code; nothing is written or lost.

All through the command line, as a user meets it.
"""

import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.cli import main
from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM
from modern_llm.models.weights import model_weights
from modern_llm.registry import _REGISTRIES
from modern_llm.runtime import names
from modern_llm.runtime.artifacts import sha256_file, to_json
from modern_llm.runtime.files import locked
from modern_llm.training.checkpoint import read_checkpoint, write_checkpoint

Make = Callable[..., Path]
Refused = Callable[..., str]
KINDS = {"pretrain": "text", "sft": "instruct", "dpo": "pairs", "verifier": "problems"}
PARENTS = {"sft": "pretrain", "dpo": "sft", "verifier": "dpo"}
FIELDS = {
    "text": ("text",),
    "instruct": ("prompt", "answer"),
    "pairs": ("prompt", "chosen", "rejected"),
    "problems": ("question", "answer"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run a command that must fail; returns its message. By default it may not write anything."""

    def call(*arguments: object, code: int, writes: bool = False) -> str:
        capsys.readouterr()
        before = contents(tmp_path)
        assert main([str(argument) for argument in arguments]) == code
        told = capsys.readouterr().err
        assert told.count("error: ") == 1 and "Traceback" not in told
        if not writes:
            assert contents(tmp_path) == before
        return told[told.index("error: ") :]

    return call


def stage_command(stage: str, config: Path, tiny_run: Any) -> list[str]:
    """Run one stage alone, from the tiny run's checkpoint."""
    command = ["run", "--config", str(config), "--stage", stage]
    if stage in PARENTS:
        command += ["--checkpoint", str(tiny_run.run / PARENTS[stage] / "final")]
    return command


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_modl=64", "model.d_modl: unknown field; did you mean 'd_model'?"),
        ("trainin.lr=1", "trainin: unknown field; did you mean 'training'?"),
        ("model.ffn=swigluu", "unknown feed-forward 'swigluu'; did you mean 'swiglu'?"),
        ("model.position=roped", "unknown position encoding 'roped'; did you mean 'rope'?"),
        ("training.optimizer=adam_w", "unknown optimizer 'adam_w'; did you mean 'adamw'?"),
        ("training.betas=[0.9,1.0]", "training.betas.1=1.0: Input should be less than 1"),
        ('training.optimizer={"name":"muon","lr_ratio":-1}', "lr_ratio=-1 must be positive"),
        ("training.schedule=cosin", "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ("sft.data.0=alpacca", "unknown data source 'alpacca'; did you mean 'alpaca'?"),
        ("model.position.thta=1", "unknown option 'thta'; did you mean 'theta'?"),
        ("model.position.theta=big", "option theta='big' is of the wrong type"),
        ("model.position.theta=-1", "theta"),
        ("pretrain.data.0.difficulty=99", "difficulty"),
        ("pretrain.data.0.kind=poems", "kind='poems': use one of text"),
        ("sft.data.0.kind=pairs", "rows of kind 'pairs', needed here: instruct or problems"),
        ("model.n_heads=5", "d_model=32 is not a multiple of n_heads=5: use n_heads from"),
        ("model.n_kv_heads=3", "n_kv_heads=3 must divide n_heads: use one of [1, 2]"),
        ("training.micro_batch_size=3", "micro_batch_size=3 must divide batch_size=4"),
        ("model.n_heads=32", "must be even"),
        ("model.vocab_size=100", "model.vocab_size=100: tokenizer 'bpe' needs 261"),
        ("sft.training.seq_len=999", "sft.training.seq_len=999 exceeds model.max_seq_len=128"),
        ("verifier.max_new_tokens=128", "leaves no room for a prompt"),
        ("training.precision=fp16", "fp16 needs a GPU"),
    ],
)
def test_a_wrong_config(refused: Refused, make_tiny: Make, override: str, message: str) -> None:
    assert message in refused("run", "--config", make_tiny(), override, code=2)


MISSPELT = {  # kind of each registry -> overrides, what is told
    "norm": (["model.norm=rmsnrm"], "'rmsnrm'; did you mean 'rmsnorm'?"),
    "position encoding": (["model.position=alibbi"], "'alibbi'; did you mean 'alibi'?"),
    "feed-forward": (["model.ffn=geglue"], "'geglue'; did you mean 'geglu'?"),
    "activation": (["model.ffn=standard", "model.activation=gelo"], "'gelo'; did you mean 'gelu'?"),
    "attention backend": (["model.attention_backend=manuall"], "'manuall'; did you mean 'manual'?"),
    "optimizer": (["training.optimizer=muonn"], "'muonn'; did you mean 'muon'?"),
    "schedule": (["training.schedule=wsdd"], "'wsdd'; did you mean 'wsd'?"),
    "engine": (["training.distributed=ddpp"], "'ddpp'; did you mean 'ddp'?"),
    "data source": (["sft.data.0=alpacca"], "'alpacca'; did you mean 'alpaca'?"),
}


@pytest.mark.parametrize("kind", MISSPELT)
def test_a_component_that_there_is_not(refused: Refused, make_tiny: Make, kind: str) -> None:
    overrides, message = MISSPELT[kind]
    told = refused("run", "--config", make_tiny(), *overrides, code=2)
    assert f"unknown {kind} {message} (there are: " in told


def test_every_registry_is_misspelt_above() -> None:
    """Attentions and stages are choices of the config and of a flag."""
    own = {
        registry.kind
        for registry in _REGISTRIES
        if any(entry.__module__.startswith("modern_llm.") for entry in registry.values())
    }
    assert own - {"stage"} == {*MISSPELT, "attention"}


def test_an_attention_that_there_is_not(refused: Refused, make_tiny: Make) -> None:
    told = refused("run", "--config", make_tiny(), "model.attention=windw", code=2)
    assert "model.attention='windw': Input should be 'full', 'window' or 'linear'" in told
    assert "; did you mean 'window'?" in told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('model.norm={"name":"rmsnorm","theta":1}', "option 'theta' (it accepts no options)"),
        ('model.ffn={"name":"swiglu","width":1}', "unknown option 'width' (it accepts no options)"),
        ('model.position={"name":"alibi","steepnes":1}', "mean 'steepness'? (it accepts steep"),
        ("model.position.thta=1", "mean 'theta'? (it accepts theta: float = 10000.0, scaling:"),
        ('training.schedule={"name":"wsd","decai":1}', "mean 'decay'? (it accepts decay: float"),
        ('training.schedule={"name":"cosine","decay":1}', "'cosine': unknown option 'decay' (it"),
        ('training.optimizer={"name":"adamw","lr_ratio":1}', "unknown option 'lr_ratio' (it accep"),
        ("pretrain.data.0.row=1", "unknown option 'row'; did you mean 'rows'? (it accepts "),
    ],
)  # fmt: skip
def test_an_option_that_a_component_does_not_take(
    refused: Refused, make_tiny: Make, override: str, message: str
) -> None:
    assert message in refused("run", "--config", make_tiny(), override, code=2)


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["model.hidden_size=320", "model.num_heads=12"],
            ["d_model=320 is not a multiple of n_heads=12: use n_heads from [5, 8, 10, 16]"],
        ),
        (["model.attention=window"], ["attention=window needs window=<tokens>"]),
        (["model.window=8"], ["window, n_sinks and window_pattern need attention=window"]),
        (
            ["model.attention=linear", "model.n_sinks=2", "model.sink=learned", "model.softcap=9"],
            [
                "window, n_sinks and window_pattern need attention=window",
                "attention=linear has no softmax and no kernels: leave out sink, softcap",
            ],
        ),
        (
            ["model.attention=linear", "model.position=alibi"],
            ["attention=linear has no logits, which position encoding 'alibi' adds to: use rope"],
        ),
        (["model.d_model=34"], ["'rope': it turns pairs, so head_size", "must be even, got 17"]),
        (
            ["model.n_heads=8", "model.n_kv_heads=3"],
            ["n_kv_heads=3 must divide n_heads: use one of [1, 2, 4, 8]"],
        ),
        (["model.moe={}"], ["model.moe.n_experts: is required"]),
        (['model.moe={"n_experts":2,"top_k":3}'], ["model.moe: top_k=3 exceeds n_experts=2"]),
        (['model.moe={"n_experts":2,"top_k":0}'], ["model.moe.top_k=0: Input should be greater"]),
        (["model.dropout=1"], ["model.dropout=1: Input should be less than 1"]),
        (["model.dropout=-0.1"], ["model.dropout=-0.1: Input should be greater than or eq"]),
        (
            ["model.attention_backend=sdpa", "model.softcap=9"],
            ["attention backend 'sdpa' has no softcap: use one of "],
        ),
        (  # between fields: all at once
            ["model.n_heads=12", "model.n_kv_heads=5", "model.attention=window", "model.softcap=1"],
            ["d_model=32 is not a multiple of n_heads=12", "n_kv_heads=5 must", "needs window="],
        ),
        (  # single fields: all at once
            ["model.dropout=2", 'model.moe={"n_experts":2,"top_k":3}', "dpo.beta=0"],
            ["model.dropout=2: ", "model.moe: top_k=3", "dpo.beta=0: "],
        ),
        (  # what only building shows: all at once
            ["model.d_model=34", "training.schedule=wsdd", "pretrain.data.0.row=1"],
            ["must be even, got 17", "unknown schedule 'wsdd'", "unknown option 'row'"],
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together(
    refused: Refused, make_tiny: Make, overrides: list[str], messages: list[str]
) -> None:
    told = refused("run", "--config", make_tiny(), *overrides, code=2)
    assert [message for message in messages if message not in told] == []
    assert told.count("model: ") <= len(messages)


# --- plugins ------------------------------------------------------------------------------------

NORM = "from modern_llm.models.norms import NORMS, Norm\n@NORMS.register('mine')\n"
FFN = "from modern_llm.models.ffn import FFNS, FFN, GatedFFN\n@FFNS.register('mine')\n"
POSITION = (
    "from modern_llm.models.positions import POSITIONS, PositionEncoding\n"
    "@POSITIONS.register('mine')\n"
)
SOURCE = "from modern_llm.data.sources.base import SOURCES, Source\n@SOURCES.register('mine')\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "bad.py: SyntaxError: "),
        ("1 / 0\n", "bad.py: ZeroDivisionError: division by zero"),
        ("x = 1\n", "bad.py: registers nothing; decorate a class, such as @NORMS.register"),
        (NORM + "class Mine(Norm): pass\n", "norm 'mine': Mine defines no forward"),
        (
            NORM.replace("mine", "rms").replace(" Norm", " RMSNorm") + "class M(RMSNorm): pass\n",
            "norm 'rms' is registered already",
        ),
        (NORM + "class Mine: pass\n", "norm 'mine': Mine must be a subclass of Norm"),
        (NORM + "def mine(x): return x\n", "norm 'mine': mine must be a subclass of Norm"),
        (
            NORM + "class Mine(Norm):\n    def __init__(self, width): ...\n",
            "Mine defines no forward; Mine takes (width), it is given (width, eps, bias)",
        ),
        (POSITION + "class Mine: pass\n", "'mine': Mine must be a subclass of PositionEncoding"),
        (
            POSITION + "class Mine(PositionEncoding):\n    def __init__(self, dims, theta): ...\n",
            "position encoding 'mine': Mine takes (dims, theta), it is given (dims)",
        ),
        (FFN + "class Mine(FFN): pass\n", "feed-forward 'mine': Mine defines no forward"),
        (FFN + "class Mine(GatedFFN): pass\n", "feed-forward 'mine': Mine defines no gate"),
        (SOURCE + "class Mine(Source): pass\n", "source 'mine': Mine defines no fingerprint, rows"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_used(
    refused: Refused, make_tiny: Make, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text(text)
    config = make_tiny()
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        told = refused("run", "--config", config, "--plugin", tmp_path / "bad.py", code=2)
    finally:
        sys.dont_write_bytecode = before
    assert told.startswith(f"error: --plugin {tmp_path / 'bad.py'}: ")
    assert message in told


def test_a_plugin_that_is_not_there(refused: Refused, make_tiny: Make, tmp_path: Path) -> None:
    told = refused("run", "--config", make_tiny(), "--plugin", tmp_path / "none.py", code=2)
    assert f"--plugin {tmp_path / 'none.py'}: no such file" in told


PLUGIN = NORM.replace("mine", "shifted") + (
    "class Shifted(Norm):\n"
    "    def __init__(self, width, eps, bias=False):\n"
    "        super().__init__()\n"
    "        import torch\n"
    "        self.weight = torch.nn.Parameter(torch.ones(width))\n"
    "    def forward(self, x):\n"
    "        return x * self.weight\n"
)


def test_another_plugin_than_that_of_the_run(
    cli: Callable[..., Any], make_tiny: Make, tmp_path: Path
) -> None:
    """Its hash is in the run's config and in its checkpoints; each command asks for that file."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, other = tmp_path / "a" / "shifted.py", tmp_path / "b" / "shifted.py"
    first.write_text(PLUGIN)
    other.write_text(PLUGIN + "# another\n")
    config = make_tiny({"model.norm": "shifted"})
    stage = ["--stage", "pretrain", "--max-steps", "1"]
    made = cli("run", "--config", config, *stage, "--plugin", first)
    assert made.returncode == 0, made.stderr
    run = tmp_path / "runs" / "tiny"
    commands = [
        ["run", "--config", run / "config.json", *stage],
        ["generate", "--checkpoint", run, "--device", "cpu", "--max-new-tokens", "2", "hello"],
        ["inference", "--checkpoint", run / "pretrain", "--device", "cpu", "--prompt", "hello"],
        ["export", run, tmp_path / "exported"],
    ]
    before = contents(tmp_path)
    for command in commands:
        without = cli(*command)
        assert without.returncode == 2 and "Traceback" not in without.stderr
        assert "was made with components from elsewhere: give --plugin PATH/TO/shifted.py" in (
            without.stderr
        )
        wrong = cli(*command, "--plugin", other)
        assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
        assert "was made with another shifted.py: its sha256 was" in wrong.stderr
        assert sha256_file(first)[:12] in wrong.stderr and sha256_file(other)[:12] in wrong.stderr
    both = cli(*commands[1], "--plugin", first, "--plugin", other)
    assert both.returncode == 2
    assert f"--plugin {other}: a plugin named shifted.py is loaded already" in both.stderr
    assert {k: v for k, v in contents(tmp_path).items() if "__pycache__" not in k} == {
        k: v for k, v in before.items() if "__pycache__" not in k
    }
    right = cli(*commands[1], "--plugin", first)
    assert right.returncode == 0, right.stderr


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/x", "", "..", "a\nb", "a\\b"])
def test_a_run_name_with_separators(refused: Refused, make_tiny: Make, name: str) -> None:
    told = refused("run", "--config", make_tiny(), "--run-name", name, code=2)
    assert f"name: run name {name!r}: use letters, digits" in told


def test_a_yaml_config_with_code_in_it(refused: Refused, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    config = tmp_path / "evil.yaml"
    config.write_text(f"name: !!python/object/apply:os.system ['touch {canary}']\n")
    assert "evil.yaml: cannot be read as yaml" in refused("run", "--config", config, code=2)


# --- data files ---------------------------------------------------------------------------------


def rows(kind: str, n: int = 200) -> list[dict[str, str]]:
    """Good rows, of which some go to every split by their hash."""
    return [
        {name: f"row {i}: {name} number {i * 7}. #### {i}" for name in FIELDS[kind]}
        for i in range(n)
    ]


def lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


BROKEN: dict[str, Callable[[str], tuple[str, bytes | None, str]]] = {
    "missing": lambda kind: ("rows.jsonl", None, "rows.jsonl: no such file"),
    "empty": lambda kind: ("rows.jsonl", b"", "no row"),
    "blank lines": lambda kind: ("rows.jsonl", b"\n\n \n", "no row"),
    "not JSON": lambda kind: ("rows.jsonl", b"what is this?\n" * 200, "rows.jsonl:101: not JSON"),
    "other rows": lambda kind: ("rows.jsonl", b"[1, 2]\n" * 200, "instead of an object"),
    "no such field": lambda kind: (
        *("rows.jsonl", lines([{"colour": "red"}] * 200)),
        f"rows.jsonl:101: no field '{FIELDS[kind][0]}' (there are: colour)",
    ),
    "numbers": lambda kind: (
        *("rows.jsonl", lines([dict.fromkeys(FIELDS[kind], 3)] * 200)),
        f"field '{FIELDS[kind][0]}' is int, not text",
    ),
    "empty text": lambda kind: (
        *("rows.jsonl", lines([dict.fromkeys(FIELDS[kind], " ")] * 200)),
        "no row",
    ),
    "binary": lambda kind: ("rows.jsonl", b"\xff\xfe\x00\x80" * 99, "rows.jsonl: not UTF-8 text"),
    "torn gzip": lambda kind: (
        *("rows.jsonl.gz", gzip.compress(lines(rows(kind)))[:30]),
        "rows.jsonl.gz: cannot be read",
    ),
    "no gzip": lambda kind: ("rows.jsonl.gz", lines(rows(kind)), "rows.jsonl.gz: cannot be read"),
    "torn list": lambda kind: ("rows.json", json.dumps(rows(kind))[:-9].encode(), "not JSON"),
    "no list": lambda kind: ("rows.json", b'{"rows": []}', "holds one dict, not a list of rows"),
    "no parquet": lambda kind: ("rows.parquet", b"PAR1" * 99, "cannot be read as Parquet"),
    "unknown ending": lambda kind: ("rows.csv", b"text\nx\n", "rows are read from .jsonl"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("stage", KINDS)
def test_a_broken_data_file(
    refused: Refused, make_tiny: Make, tmp_path: Path, tiny_run: Any, stage: str, fault: str
) -> None:
    kind = KINDS[stage]
    name, data, message = BROKEN[fault](kind)
    if data is not None:
        (tmp_path / name).write_bytes(data)
    source = {"name": "parquet" if name.endswith("parquet") else "jsonl", "kind": kind}
    config = make_tiny({f"{stage}.data": [{**source, "path": str(tmp_path / name)}]})

    told = refused(*stage_command(stage, config, tiny_run), code=3)

    assert message in told
    assert name in told


def test_a_folder_in_the_place_of_a_file(refused: Refused, make_tiny: Make, tmp_path: Path) -> None:
    source = {"name": "text", "path": str(tmp_path)}
    config = make_tiny({"pretrain.data": [source]})
    told = refused("run", "--config", config, "--stage", "pretrain", code=3)
    assert f"{tmp_path}: no such file" in told


def test_a_data_root_that_is_not_there(
    refused: Refused, make_tiny: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_tiny({"pretrain.data": ["wikitext2"]})
    command = ("run", "--config", config, "--stage", "pretrain")
    told = refused(*command, f"data.root={tmp_path / 'gone'}", code=3)
    assert f"data.root={tmp_path / 'gone'}: no such folder" in told
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path / "lost"))
    assert f"MODERN_LLM_DATA={tmp_path / 'lost'}: no such folder" in refused(*command, code=3)


LATE: dict[str, tuple[str, bytes, bytes, str]] = {  # file, its content, what mends it, message
    "malformed": (
        "rows.jsonl",
        lines(rows("text")) + b'{"text": 3}\n' * 101,
        lines(rows("text")) + b'{"text": 3}\n' * 100,
        "rows.jsonl:301: field 'text' is int, not text; 101 malformed rows are more than "
        "data.max_bad_rows=100",
    ),
    "torn": (
        "rows.jsonl.gz",
        gzip.compress(lines(rows("text")))[:-20],
        gzip.compress(lines(rows("text"))),
        "rows.jsonl.gz: cannot be read: Compressed file ended",
    ),
}


@pytest.mark.parametrize("fault", LATE)
def test_what_goes_bad_late_stops_the_run_and_it_goes_on_when_it_is_mended(
    refused: Refused, make_tiny: Make, tmp_path: Path, fault: str
) -> None:
    """The first rows are fine, so that only the whole pass finds it; no half store is left."""
    name, broken, mended, message = LATE[fault]
    path = tmp_path / name
    path.write_bytes(broken)
    config = make_tiny({"pretrain.data": [{"name": "jsonl", "path": str(path)}]})
    command = ["run", "--config", str(config), "--stage", "pretrain", "--max-steps", "1"]

    assert message in refused(*command, code=3, writes=True)

    assert not list(tmp_path.glob("cache/stores/*/manifest.json"))
    assert not list(tmp_path.rglob("checkpoints"))
    path.write_bytes(mended)
    assert main(command) == 0
    result = json.loads((tmp_path / "runs" / "tiny" / "pretrain" / "result.json").read_text())
    bad = {"malformed": 100} if fault == "malformed" else {}
    assert result["data"][0]["dropped"] == bad


def test_prompts_longer_than_the_context(
    make_tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are cut from their start in training, sampling and evaluation; nothing breaks."""
    long = "the quick brown fox jumps over the lazy dog and then again " * 40
    changes: dict[str, Any] = {}
    for stage, kind in KINDS.items():
        path = tmp_path / f"{kind}.jsonl"
        first = FIELDS[kind][0]
        values = rows(kind)
        for row in values[::2] if stage == "verifier" else values:  # it leaves the long ones out
            row[first] = f"{long} {row[first]}"
        path.write_bytes(lines(values))
        changes[f"{stage}.data"] = [{"name": "jsonl", "kind": kind, "path": str(path)}]
    for task, kind in (("reasoning", "problems"), ("preference", "pairs")):
        changes[f"eval.{task}.source"] = changes[
            {"problems": "verifier", "pairs": "dpo"}[kind] + ".data"
        ][0]
    changes["eval.prompts"] = [long]
    changes["eval.completions"] = [long]
    config = make_tiny({**changes, "training.max_steps": 1, "pretrain.training.max_steps": 1})

    assert main(["run", "--config", str(config)]) == 0

    run = tmp_path / "runs" / "tiny"
    for stage in KINDS:
        result = json.loads((run / stage / "result.json").read_text())
        assert result["training"]["steps"] == 1
        assert all(row["rows"] > 0 for row in result["data"])
    generate = ["generate", "--checkpoint", str(run / "sft" / "final"), "--device", "cpu"]
    assert main([*generate, "--max-new-tokens", "4", long]) == 0


def test_answers_longer_than_the_context(
    refused: Refused, make_tiny: Make, tmp_path: Path, tiny_run: Any
) -> None:
    """An answer is never cut for SFT: its end would not be learned. None left is an error."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([{**row, "answer": "so " * 500} for row in rows("instruct")]))
    source = {"name": "jsonl", "kind": "instruct", "path": str(path)}
    config = make_tiny({"sft.data": [source]})
    told = refused(*stage_command("sft", config, tiny_run), code=3, writes=True)
    assert "no row is left of instruct" in told and "answer too long" in told


# --- tokenizer and model ------------------------------------------------------------------------


def test_a_tokenizer_with_more_ids_than_the_model(
    refused: Refused, make_tiny: Make, tiny_run: Any
) -> None:
    path = tiny_run.run / "sft" / "final" / "tokenizer.json"
    config = make_tiny({"tokenizer": {"name": "file", "path": str(path)}, "model.vocab_size": 300})
    told = refused("run", "--config", config, code=2)
    assert "model.vocab_size=300: tokenizer 'file' has 512 ids; set model.vocab_size to 512" in told


@pytest.mark.parametrize("content", [None, "", "{}", "no json", "[1]"])
def test_a_tokenizer_file_that_is_none(
    refused: Refused, make_tiny: Make, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    config = make_tiny({"tokenizer": {"name": "file", "path": str(path)}})
    assert f"{path}: " in refused("run", "--config", config, code=3)


def test_a_vocabulary_that_does_not_match_the_checkpoint(
    refused: Refused, make_tiny: Make, tiny_run: Any
) -> None:
    config = make_tiny({"model.vocab_size": 600})
    told = refused(*stage_command("sft", config, tiny_run), code=4)
    assert "model.vocab_size is 512 there and 600 here" in told


@pytest.fixture
def mismatched(tmp_path: Path, tiny_run: Any) -> Path:
    """A checkpoint that is whole, but whose tokenizer has more ids than its model."""
    found = read_checkpoint(tiny_run.run / "sft" / "final")
    meta = {**found.meta, "model": {**found.meta["model"], "vocab_size": 300}}
    weights = model_weights(ModernDecoderLM(ModelConfig.model_validate(meta["model"])))
    tokenizer = found.tokenizer_path.read_text()
    target = tmp_path / "mismatched"
    write_checkpoint(
        target, weights=weights, meta=meta, tokenizer_json=tokenizer, trainer_state=None
    )
    return target


def test_a_checkpoint_whose_tokenizer_is_not_its_models(
    refused: Refused, make_tiny: Make, mismatched: Path
) -> None:
    config = make_tiny({"model.vocab_size": 300})
    for command in checkpoint_commands(mismatched, config):
        told = refused(*command, code=4)
        assert "its tokenizer has 512 ids, its model 300" in told


# --- checkpoints --------------------------------------------------------------------------------


def checkpoint_commands(folder: Path, config: Path) -> list[list[str]]:
    """Every command that reads a checkpoint."""
    own = ["--config", str(config)]
    return [
        ["run", *own, "--stage", "dpo", "--checkpoint", str(folder)],
        ["eval", *own, "--checkpoint", str(folder)],
        ["compare", *own, "--checkpoints", str(folder)],
        ["generate", "--checkpoint", str(folder), "--device", "cpu", "hello"],
        ["export", str(folder), str(config.parent / "exported")],
    ]


@pytest.fixture
def copied(tmp_path: Path, tiny_run: Any) -> Path:
    return shutil.copytree(tiny_run.run / "sft" / "final", tmp_path / "checkpoint")


def torn(folder: Path) -> str:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    return "model.safetensors has"


def altered(folder: Path) -> str:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "model.safetensors was altered"


def other_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|user|>", "<|uzer|>"))
    return "tokenizer.json was altered"


def without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "model.safetensors is missing"


def without_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "it has no manifest.json"


def newer(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    return "newer version"


FAULTS = (torn, altered, other_tokenizer, without_weights, without_manifest, newer)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint(
    refused: Refused, make_tiny: Make, copied: Path, fault: Callable[[Path], str]
) -> None:
    message = fault(copied)
    for command in checkpoint_commands(copied, make_tiny()):
        assert message in refused(*command, code=4)


def test_a_checkpoint_of_another_architecture(
    refused: Refused, make_tiny: Make, tiny_run: Any
) -> None:
    config = make_tiny({"model.d_model": 64, "model.norm": "layernorm", "model.n_layers": 2})
    told = refused(*stage_command("dpo", config, tiny_run), code=4)
    for field in (
        "d_model is 32 there and 64 here",
        "n_layers is 1 there and 2 here",
        "model.norm",
    ):
        assert field in told
    verifier = tiny_run.run / "verifier" / "final"
    command = ("run", "--config", make_tiny(), "--stage", "sft", "--checkpoint", verifier)
    assert "does not fit" in refused(*command, code=4)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_pickle_is_refused_and_never_executed(
    refused: Refused, make_tiny: Make, tmp_path: Path, name: str, as_file: bool
) -> None:
    canary = tmp_path / "canary"
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps({"weights": Payload(canary)}))
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    path = folder / name if as_file else folder
    for command in checkpoint_commands(path, make_tiny()):
        told = refused(*command, code=4)
        assert "never loaded" in told if as_file else "is not a checkpoint" in told
    assert not canary.exists()


def test_code_with_a_right_manifest_is_never_executed(
    refused: Refused, make_tiny: Make, copied: Path, tmp_path: Path
) -> None:
    """Somebody packs a pickle as weights and makes the hashes right."""
    canary = tmp_path / "canary"
    torch.save({"weights": Payload(canary)}, copied / "model.safetensors")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in copied.iterdir()
        if path.name != "manifest.json"
    }
    (copied / "manifest.json").write_text(to_json({"format": 1, "files": files}))
    for command in checkpoint_commands(copied, make_tiny()):
        refused(*command, code=4)
    assert not canary.exists()


def test_a_trainer_state_with_code_in_it_is_never_executed(
    refused: Refused, tmp_path: Path, tiny_run: Any
) -> None:
    """A run folder from elsewhere: resuming it would read optimizer and random state."""
    canary = tmp_path / "canary"
    shutil.copytree(tiny_run.run.parent, tmp_path / "runs")
    stage = tmp_path / "runs" / "tiny" / "sft"
    (stage / "result.json").unlink()
    for folder in (stage / "checkpoints").iterdir():
        torch.save({"progress": Payload(canary)}, folder / "trainer.pt")
        (folder / "trainer.pt").chmod(0o640)
        manifest = json.loads((folder / "manifest.json").read_text())
        size = (folder / "trainer.pt").stat().st_size
        facts = {"bytes": size, "sha256": sha256_file(folder / "trainer.pt")}
        manifest["files"]["trainer.pt"] = facts
        (folder / "manifest.json").write_text(to_json(manifest))
    places = [f"paths.output={tmp_path / 'runs'}", f"paths.report={tmp_path / 'report'}"]
    command = ["run", *tiny_run.arguments, "--stage", "sft", *places]

    told = refused(*command, code=4, writes=True)

    assert "trainer.pt is refused: it holds more than tensors and plain values" in told
    assert not canary.exists()
    assert (stage / "final").is_dir() and len(list((stage / "checkpoints").iterdir())) == 2


# --- places -------------------------------------------------------------------------------------


def test_a_read_only_output_folder(refused: Refused, make_tiny: Make, make_disk: Make) -> None:
    disk = make_disk(read_only=True)
    config = make_tiny()
    told = refused("run", "--config", config, "--output-dir", disk / "runs", code=6)
    assert f"{disk} cannot be written" in told and "give another --output-dir" in told
    told = refused("run", "--config", config, f"data.cache_dir={disk / 'cache'}", code=6)
    assert f"{disk} cannot be written" in told


def test_a_file_in_the_place_of_the_output_folder(
    refused: Refused, make_tiny: Make, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    flags = ("--output-dir", tmp_path / "taken")
    told = refused("run", "--config", make_tiny(), *flags, code=6)
    assert f"{tmp_path / 'taken'} cannot be written" in told


def test_a_full_output_folder(refused: Refused, make_tiny: Make, make_disk: Make) -> None:
    disk = make_disk(kb=300)
    told = refused("run", "--config", make_tiny(), "--output-dir", disk / "runs", code=6)
    assert "GB free, the checkpoints take up to" in told and str(disk) in told


def test_a_disk_that_fills_while_training_loses_nothing(
    refused: Refused, make_tiny: Make, make_disk: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user takes the room that was there at the start; with room again it goes on."""
    disk = make_disk(kb=1000)  # room for two checkpoints
    steps = {"pretrain.training.max_steps": 6, "training.save_every": 1, "training.keep_last": 9}
    command = ["run", "--config", str(make_tiny(steps)), "--stage", "pretrain"]
    command += [f"paths.output={disk / 'runs'}"]
    usage = shutil.disk_usage
    roomy = usage("/")._replace(free=10**12)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: roomy)
        told = refused(*command, code=6, writes=True)

    checkpoints = disk / "runs" / "tiny" / "pretrain" / "checkpoints"
    assert f"cannot write checkpoint {checkpoints}/step-0000000" in told
    assert "free space or choose another output, then start again: the run goes on" in told
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left and all(name.startswith("step-") for name in left)  # whole ones only
    for name in left:
        read_checkpoint(checkpoints / name).trainer_state()

    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    assert main(command) == 0
    result = json.loads((disk / "runs" / "tiny" / "pretrain" / "result.json").read_text())
    assert (result["training"]["steps"], result["provenance"]["restarts"]) == (6, 1)


def test_a_run_folder_that_is_in_use(
    refused: Refused, tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tiny_run.run)
    with locked(tiny_run.run):
        told = refused("run", *tiny_run.arguments, code=2)
        assert f"in use by another run (pid {os.getpid()} on " in told
    assert {**contents(tiny_run.run), ".lock": b""} == {**before, ".lock": b""}


def test_a_clock_that_was_set_back_loses_no_run(
    make_tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later run has an earlier time in its name; each config finds its own run again."""
    command = ["run", "--config", str(make_tiny()), "--stage", "pretrain", "--no-report"]
    other = [*command, "pretrain.training.lr=2e-3"]
    assert main(command) == 0
    assert main(other) == 0

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "datetime":
            return datetime.now(tz) - timedelta(days=1)

    monkeypatch.setattr(names, "datetime", Yesterday)
    third = [*command, "pretrain.training.lr=3e-3"]
    assert main(third) == 0
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 3 and runs[1].stat().st_mtime > runs[2].stat().st_mtime
    before = {run: contents(run) for run in runs}
    for again in (command, other, third):
        assert main(again) == 0
    assert {run: contents(run) for run in sorted((tmp_path / "runs").iterdir())} == before


def test_two_runs_into_one_folder(refused: Refused, make_tiny: Make, tmp_path: Path) -> None:
    """The second is refused at once; the first is stopped by a signal and says how it goes on."""
    long = {"pretrain.training.max_steps": 100_000, "training.save_every": 0}
    arguments = ["run", "--config", str(make_tiny(long)), "--stage", "pretrain"]
    log = tmp_path / "runs" / "tiny" / "pretrain" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "modern_llm", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as first:  # fmt: skip
        deadline = time.monotonic() + 60
        while not (log.exists() and '"train"' in log.read_text()):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

        begin = time.monotonic()
        told = refused(*arguments, code=2, writes=True)  # this process is the second one
        assert time.monotonic() - begin < 20
        assert f"is in use by another run (pid {first.pid} on " in told
        assert first.poll() is None  # undisturbed
        first.send_signal(signal.SIGTERM)
        assert first.stderr is not None
        told = first.stderr.read()
        assert first.wait(30) == 75
    assert "saved, the same command goes on from there" in told
    assert len(list((log.parent / "checkpoints").glob("step-*"))) == 1
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["tiny"]
