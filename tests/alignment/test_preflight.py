import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.alignment.pipeline import AlignmentPipeline
from modern_llm.cli.arguments import duration_s
from modern_llm.config import list_presets, load_config
from modern_llm.errors import ConfigError, DataError
from modern_llm.training import throughput

Places = Callable[..., Any]


def problems(place: Any, *overrides: str, stage: str = "all", **options: Any) -> list[Any]:
    pipeline = AlignmentPipeline(load_config(place.config, list(overrides)))
    return pipeline.preflight(stage, **options).problems


def told(place: Any, *overrides: str, **options: Any) -> str:
    return "\n".join(map(str, problems(place, *overrides, **options)))


def test_nothing_stands_in_the_way_of_a_good_config(place: Places) -> None:
    assert problems(place()) == []


def test_all_problems_at_once(
    place: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    changes = {
        "pretrain.data": [{"name": "synthetic", "kind": "text", "rowz": 3}],
        "sft.data": [{"name": "jsonl", "kind": "instruct", "path": str(tmp_path / "none.jsonl")}],
        "dpo.data": [{"name": "synthetic", "kind": "problems"}],
        "dpo.training": {"optimizer": {"name": "adamw", "nestrov": True}},
        "verifier.training": {"schedule": {"name": "cosin"}},
        "verifier.max_new_tokens": 126,
        "eval.reasoning.max_new_tokens": 128,
        "eval.perplexity": [{"source": "wikitext2"}],
        "data.root": str(tmp_path / "nowhere"),
        "sft.training": {"device": "cuda:7"},
        "pretrain.training": {"precision": "fp16", "max_steps": 4},
        "paths.output": str(tmp_path / "taken" / "runs"),
    }
    here = place(None, changes)
    assert here.main() == 2
    text = capsys.readouterr().err
    for part in (
        "rowz", "none.jsonl: no such file",
        "rows of kind 'problems', needed here: pairs", "nestrov", "cosin",
        "verifier.max_new_tokens=126 leaves no room for a prompt in model.max_seq_len=128",
        "eval.reasoning.max_new_tokens=128 leaves no room", "data.root=", "cuda:7",
        "fp16 needs a GPU", "taken cannot be written",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("error:") == 1
    assert not (here.folder / "cache").exists()
    assert not (here.folder / "runs").exists()


def test_only_what_the_stage_needs_is_checked(place: Places, tmp_path: Path) -> None:
    missing = {"name": "jsonl", "kind": "pairs", "path": str(tmp_path / "none.jsonl")}
    here = place(None, {"dpo.data": [missing]})
    assert problems(here, stage="pretrain") == []
    assert "none.jsonl: no such file" in told(here)


@pytest.mark.parametrize(
    ("stage", "kind"),
    [("pretrain", "pairs"), ("sft", "text"), ("dpo", "instruct"), ("verifier", "instruct")],
)
def test_sources_of_the_wrong_kind(place: Places, stage: str, kind: str) -> None:
    here = place(None, {f"{stage}.data": [{"name": "synthetic", "kind": kind}]})
    (found,) = problems(here)
    assert isinstance(found, ConfigError)
    assert f"rows of kind '{kind}', needed here:" in str(found)


def test_evaluation_sources_are_checked_too(place: Places) -> None:
    changes = {
        "eval.perplexity": [{"source": {"name": "synthetic", "kind": "pairs"}}],
        "eval.text_metrics": [
            {"metric": "rouge", "source": {"name": "synthetic", "kind": "text"}},
        ],
        "eval.reasoning.source": {"name": "synthetic", "kind": "instruct"},
        "eval.preference.source": {"name": "synthetic", "kind": "problems"},
    }
    text = told(place(None, changes))
    for wrong, needed in (
        ("pairs", "text"), ("text", "instruct or problems"), ("instruct", "problems"),
        ("problems", "pairs"),
    ):  # fmt: skip
        assert f"rows of kind '{wrong}', needed here: {needed}" in text


def test_data_that_is_neither_local_nor_on_the_hub(place: Places, offline: None) -> None:
    """Without this the fault would be found after the stages before it were trained."""
    here = place(None, {"dpo.data": ["hh-rlhf"], "eval.perplexity": [{"source": "wikitext103"}]})
    found = problems(here)
    assert all(isinstance(problem, DataError) for problem in found)
    text = "\n".join(map(str, found))
    assert "Anthropic/hh-rlhf" in text and "Salesforce/wikitext" in text
    assert "MODERN_LLM_DATA" in text and "let this machine reach the hub" in text


def test_local_data_is_found(
    place: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    folder = tmp_path / "data" / "wikitext2"
    folder.mkdir(parents=True)
    (folder / "wiki.test.raw").write_text(" = Title = \n\n Some text . \n")
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path / "data"))
    here = place(None, {"eval.perplexity": [{"source": "wikitext2-raw"}]})
    assert problems(here) == []
    assert "wiki.valid.raw" in told(here, "eval.perplexity.0.split=validation")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("eval.device=cuda:7", "eval.device: 'cuda:7' is not"),
        ("eval.device=tpu9", "eval.device: unknown device 'tpu9'"),
        ("eval.precision=fp16", "eval.precision: fp16 needs a GPU"),
    ],
)
def test_the_device_of_eval_is_checked_before_anything_is_trained(
    place: Places, override: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    assert here.main(override) == 2
    assert rule in capsys.readouterr().err
    assert not (here.folder / "runs").exists()
    assert problems(here, override, stage="pretrain") == []  # which does not evaluate


def test_lengths_of_pairs(place: Places) -> None:
    text = told(place(), "dpo.max_prompt_tokens=2", "dpo.max_answer_tokens=1")
    assert "dpo.max_prompt_tokens: at least 3" in text
    assert "dpo.max_answer_tokens: at least 2" in text


def test_samples_need_room(place: Places) -> None:
    assert "eval.sample_tokens=126" in told(place(), "eval.sample_tokens=126")
    assert problems(place(), "eval.sample_tokens=125") == []


def test_the_tokenizer_is_checked(place: Places, tmp_path: Path, tiny_run: Any) -> None:
    file = {"name": "file", "path": str(tmp_path / "none.json")}
    here = place(None, {"tokenizer": file})
    assert "none.json: no such tokenizer.json" in told(here)
    shutil.copy(tiny_run.run / "sft" / "final" / "tokenizer.json", tmp_path / "none.json")
    assert problems(here) == []
    assert "set model.vocab_size to 512 or more" in told(here, "model.vocab_size=400")
    parent = tiny_run.run / "pretrain" / "final"  # brings its own
    (tmp_path / "none.json").unlink()
    assert problems(here, stage="pretrain", checkpoint=parent) == []


def test_a_vocabulary_without_room_for_bytes(place: Places) -> None:
    assert "model.vocab_size=200: tokenizer 'bpe' needs 261" in told(
        place(), "model.vocab_size=200"
    )


def test_a_full_disk_is_told_before_training(
    place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
    assert "GB free, the checkpoints take up to" in told(place())
    assert problems(place(), stage="eval") != []  # nothing to evaluate, but no word of the disk
    assert "GB free" not in told(place(), stage="eval")


def test_what_a_run_has_written_is_not_asked_for_again(
    place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
    here = place()
    run = load_config(here.config).paths.output / "tiny"
    run.mkdir(parents=True)
    assert "GB free" in told(here)
    (run / "large").write_bytes(b"")
    os.truncate(run / "large", 10**9)
    assert "GB free" not in told(here)


# --- the plan


def test_a_dry_run_writes_nothing(place: Places, capsys: pytest.CaptureFixture[str]) -> None:
    here = place()
    before = sorted(here.folder.rglob("*"))
    assert here.main("--dry-run") == 0
    out = capsys.readouterr().out
    assert "ready: nothing stands in the way; nothing was written" in out
    for word in ("pretrain", "sft", "dpo", "verifier", "FLOPs", "memory", "disk"):
        assert word in out
    assert sorted(here.folder.rglob("*")) == before


def test_a_dry_run_tells_problems_and_the_exit_code_of_the_first(
    place: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place(None, {"sft.data": [{"name": "text", "path": str(tmp_path / "none.txt")}]})
    assert here.main("--dry-run") == 2  # of the wrong kind
    out = " ".join(capsys.readouterr().out.split())
    assert "stands in the way:" in out and "rows of kind 'text'" in out
    missing = {"name": "jsonl", "kind": "instruct", "path": str(tmp_path / "none.jsonl")}
    here = place(None, {"sft.data": [missing]})
    assert here.main("--dry-run") == 3
    assert "none.jsonl: no such file" in " ".join(capsys.readouterr().out.split())


def test_the_numbers_of_the_plan(place: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "cpu_peak_flops", lambda precision, threads: 1e12)
    config = load_config(place().config, ["sft.training.seq_len=64"])
    preflight = AlignmentPipeline(config).preflight()
    plans = {plan.stage: plan for plan in preflight.plan()}
    assert list(plans) == ["pretrain", "sft", "dpo", "verifier"]
    assert plans["pretrain"].tokens == 4 * 4 * 128
    assert plans["sft"].tokens == 3 * 4 * 64
    model = config.model
    matrices = 4 * model.d_model**2 + 3 * model.d_model * model.d_ff  # of the one layer
    for stage, seq_len in (("pretrain", 128), ("sft", 64)):
        scores = 2 * 2 * seq_len * model.d_model
        forward = 2 * (matrices + model.vocab_size * model.d_model) + scores
        flops = 3 * forward * plans[stage].tokens
        assert plans[stage].flops == pytest.approx(flops, rel=0.01)
        hours = plans[stage].flops / (1e12 * throughput.ASSUMED_MFU) / 3600
        assert plans[stage].hours == pytest.approx(hours)
    params = model.vocab_size * model.d_model + matrices + 3 * model.d_model
    assert preflight.cost.params == params
    assert preflight.state_gb() == pytest.approx(16 * params / 1e9)


def test_a_plan_for_a_device_that_is_not_here(place: Places) -> None:
    config = load_config(place().config, ["training.device=cuda:7"])
    preflight = AlignmentPipeline(config).preflight()
    assert all(plan.hours is None for plan in preflight.plan())
    assert "cuda:7" in str(preflight.problems[0])


def test_every_preset_has_a_plan(tmp_path: Path, offline: None) -> None:
    for name in list_presets():
        config = load_config(name, [f"paths.output={json.dumps(str(tmp_path))}"])
        preflight = AlignmentPipeline(config).preflight()
        assert len(preflight.plan()) == 4
        assert preflight.cost.params > 0
        for problem in preflight.problems:  # of this machine, not of the preset
            assert isinstance(problem, DataError) or ".device: 'cuda'" in str(problem)


def test_elsewhere_leaves_devices_out_and_nothing_else(place: Places) -> None:
    overrides = ("sft.training.device=cuda:7", "eval.device=cuda:7", "verifier.max_new_tokens=126")
    here, elsewhere = told(place(), *overrides), told(place(), *overrides, elsewhere=True)
    assert "cuda:7" in here and "cuda:7" not in elsewhere
    assert "leaves no room for a prompt" in here and "leaves no room for a prompt" in elsewhere


def test_batches_are_checked_for_the_ranks_that_will_be(place: Places) -> None:
    assert "not a multiple" not in told(place(), ranks=1)
    assert "not a multiple" not in told(place(), "training.micro_batch_size=2", ranks=2)
    assert (
        "batch_size=4 is not a multiple of micro_batch_size x ranks = 2 x 3; use batch_size=6"
        in told(place(), "training.micro_batch_size=2", ranks=3)
    )


@pytest.mark.parametrize(
    ("hours", "ranks", "limit", "line"),
    [
        (6, 1, "5:00:00", "warning: the estimate of 6.00 h exceeds the time limit of 5.00 h"),
        (6, 1, "2:10:00", "this takes a chain of 3 jobs or more"),
        (6, 2, "5:00:00", "time limit: 5.00 h, the estimate of 3.00 h fits"),
        (6, 1, "1-0", "time limit: 24.00 h, the estimate of 6.00 h fits"),
        (6, 1, "UNLIMITED", "the estimate of 6.00 h fits"),
        (None, 1, "5:00:00", "no estimate to compare with"),
    ],
)
def test_the_estimate_is_held_against_the_time_limit(
    hours: float | None,
    ranks: int,
    limit: str,
    line: str,
    place: Places,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``hours`` is what one device of a made-up peak takes for the tiny pretraining."""
    here = place()
    plan = AlignmentPipeline(load_config(here.config)).preflight("pretrain").plan()[0]
    peak = None if hours is None else plan.flops / (throughput.ASSUMED_MFU * hours * 3600)
    monkeypatch.setattr("modern_llm.alignment.preflight.peak_flops", lambda *_: peak)
    flags = ["--stage", "pretrain", "--dry-run", "--ranks", str(ranks), "--time-limit", limit]
    here.main(*flags, "training.micro_batch_size=2")
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:05", 7205), ("1-2", 93600), ("1-02:03:04", 93784)],
)
def test_time_limits_are_read_as_slurm_writes_them(text: str, seconds: float) -> None:
    """The formats of ``man sbatch``, ``--time``."""
    assert duration_s(text) == seconds


@pytest.mark.parametrize("flag", ["--elsewhere", "--ranks=2", "--time-limit=5"])
def test_flags_of_a_dry_run_belong_to_one(flag: str, place: Places) -> None:
    assert place().main(flag) == 2


def test_alignment_is_what_follows_pretraining(place: Places) -> None:
    flight = AlignmentPipeline(load_config(place().config)).preflight("alignment")
    assert flight.stages == ("sft", "dpo", "verifier", "eval")
    assert any("run --stage pretrain first" in str(problem) for problem in flight.problems)
