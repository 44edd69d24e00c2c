import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment.pipeline import AlignmentPipeline
from modern_llm.config import load_config
from modern_llm.data.templates import TEMPLATE_HASH
from modern_llm.errors import ConfigError
from modern_llm.runtime.artifacts import sha256_file
from modern_llm.training.checkpoint import read_checkpoint, read_trainer_state
from modern_llm.training.trainer import Trainer

TRAINED = ("pretrain", "sft", "dpo", "verifier")
SIBLING = re.compile(r"tiny_\d{8}-\d{6}(-\d+)?")
Places = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, tuple[str, int]]]
Equal = Callable[[Path, Path], bool]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# --- hand-over by files


def test_stages_hand_over_by_files(tiny_run: Any) -> None:
    before: dict[str, str] | None = None
    for stage in TRAINED:
        folder = tiny_run.run / stage
        final = read_checkpoint(folder / "final")
        result = read(folder / "result.json")
        assert result["checkpoint"]["sha256"] == final.sha256
        assert final.meta["stage"] == stage
        assert final.meta["template_sha256"] == TEMPLATE_HASH
        assert result["parent"] == read(folder / "stage.json")["parent"] == before
        own = final.meta["parent"]  # the same, but for the folder
        assert own == (before and {key: before[key] for key in ("stage", "sha256")})
        before = {"stage": stage, "path": str(folder / "final"), "sha256": final.sha256}
    models = read(tiny_run.run / "eval" / "result.json")["models"]
    assert [m["stage"] for m in models] == ["pretrain", "sft", "dpo"]
    for model in models:
        manifest = tiny_run.run / model["stage"] / "final" / "manifest.json"
        assert model["checkpoint"]["sha256"] == sha256_file(manifest)


def test_one_tokenizer_travels_through_all_stages(tiny_run: Any) -> None:
    files = [tiny_run.run / stage / "final" / "tokenizer.json" for stage in TRAINED]
    assert len({sha256_file(file) for file in files}) == 1


def test_stage_by_stage_equals_all_at_once(
    place: Places, tiny_run: Any, equal_weights: Equal
) -> None:
    here = place()
    for stage in (*TRAINED, "eval"):
        assert here.main("--stage", stage) == 0
        assert here.runs() == ["tiny"]
    for stage in TRAINED:  # every byte of every checkpoint, in another folder
        manifests = [run / stage / "final" / "manifest.json" for run in (here.run, tiny_run.run)]
        assert manifests[0].read_bytes() == manifests[1].read_bytes()
    one, other = (read(run / "eval" / "result.json") for run in (here.run, tiny_run.run))
    assert one["reasoning"] == other["reasoning"]
    for a, b in zip(one["models"], other["models"], strict=True):
        assert (a["scores"], a["samples"]) == (b["scores"], b["samples"])


# --- what stands is not touched


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--no-overwrite",), ("--stage", "sft")])
def test_a_finished_run_is_left_as_it_is(
    place: Places, tiny_run: Any, snapshot: Snapshot, flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def no_step(self: Trainer, *args: Any) -> None:
        raise AssertionError("a training step")

    monkeypatch.setattr(Trainer, "train_step", no_step)
    here = place(tiny_run.run)
    before = snapshot(here.folder)
    begin = time.perf_counter()
    assert here.main(*flags, report=True) == 0
    assert time.perf_counter() - begin < 10
    assert snapshot(here.folder) == before


def test_another_config_under_the_name_gets_a_folder_of_its_own(
    place: Places, tiny_run: Any, snapshot: Snapshot
) -> None:
    here = place(tiny_run.run)
    before = snapshot(here.folder / "runs"), snapshot(here.folder / "report")
    arguments = ("--stage", "pretrain", "--max-steps", 1)
    assert here.main(*arguments, report=True) == 0
    old, new = here.runs()
    assert old == "tiny" and SIBLING.fullmatch(new)
    after = snapshot(here.folder / "runs"), snapshot(here.folder / "report")
    for old_files, new_files in zip(before, after, strict=True):
        assert {name: new_files[name] for name in old_files} == old_files
    assert (here.folder / "report" / f"{new}_report.md").is_file()

    assert here.main(*arguments) == 0  # finds its own folder again
    assert here.runs() == [old, new]
    assert snapshot(here.folder / "runs") == after[0]
    assert here.main(*arguments, "pretrain.training.lr=0.5") == 0  # and another has a third
    assert len(here.runs()) == 3


def test_a_config_that_differs_in_logging_only_is_the_same_run(
    place: Places, tiny_run: Any, snapshot: Snapshot
) -> None:
    here = place(tiny_run.run)
    before = snapshot(here.folder)
    assert here.main("training.log_every=2", "training.keep_last=5", "description=other") == 0
    assert snapshot(here.folder) == before


def test_a_run_of_another_name_is_another_run(place: Places) -> None:
    """``tiny_2nd`` has the form of no sibling, although its config is the same."""
    here = place()
    arguments = ("--stage", "pretrain", "--max-steps", 1)
    assert here.main(*arguments, "--run-name", "tiny_2nd") == 0
    assert here.main(*arguments) == 0
    assert here.runs() == ["tiny", "tiny_2nd"]
    assert read(here.run / "config.json")["name"] == "tiny"


def test_a_run_with_a_dot_in_its_name_is_found_again(place: Places) -> None:
    here = place()
    arguments = ("--run-name", "v0.1", "--stage", "pretrain", "--max-steps", 1)
    assert here.main(*arguments) == 0
    assert here.main(*arguments, "pretrain.training.lr=0.5") == 0
    old, new = here.runs()
    assert old == "v0.1" and re.fullmatch(r"v0\.1_\d{8}-\d{6}", new)
    assert here.main(*arguments, "pretrain.training.lr=0.5") == 0
    assert here.runs() == [old, new]


def test_no_overwrite_leaves_another_run_alone(
    place: Places, tiny_run: Any, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    here = place(tiny_run.run)
    before = snapshot(here.folder)
    assert here.main("--max-steps", 1, "--no-overwrite") == 0
    assert snapshot(here.folder) == before
    assert here.runs() == ["tiny"]
    assert "holds another run; nothing done" in caplog.text


def test_force_keeps_a_backup_of_another_run(
    place: Places, tiny_run: Any, snapshot: Snapshot
) -> None:
    here = place(tiny_run.run)
    before = snapshot(here.run)
    assert here.main("--stage", "pretrain", "--max-steps", 1, "--force") == 0
    new, old = here.runs()
    assert new == "tiny" and old.startswith("tiny.bak-")
    assert snapshot(here.folder / "runs" / old) == before
    assert read(here.run / "config.json")["max_steps"] == 1
    assert not (here.run / "sft").exists()


def test_force_does_one_stage_again_and_keeps_a_backup(
    place: Places, tiny_run: Any, snapshot: Snapshot, equal_weights: Equal
) -> None:
    here = place(tiny_run.run)
    before = snapshot(here.run)
    assert here.main("--stage", "dpo", "--force") == 0
    (backup,) = here.run.glob("dpo.bak-*")
    after = snapshot(here.run)
    for name, state in before.items():
        stage, _, rest = name.partition("/")
        assert after[f"{backup.name}/{rest}" if stage == "dpo" else name] == state
    assert after["dpo/result.json"] != before["dpo/result.json"]
    assert equal_weights(here.run / "dpo" / "final", backup / "final")
    assert here.main() == 0  # and what comes after it still fits
    assert snapshot(here.run) == after


def test_resume_needs_a_run(place: Places, capsys: pytest.CaptureFixture[str]) -> None:
    here = place()
    assert here.main("--resume") == 2
    assert "no run of this config below" in capsys.readouterr().err
    assert not (here.folder / "runs").exists()


def test_resume_does_not_take_another_config(
    place: Places, tiny_run: Any, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place(tiny_run.run)
    before = snapshot(here.folder)
    assert here.main("--resume", "training.lr=0.5") == 2
    assert "another config has the name" in capsys.readouterr().err
    assert snapshot(here.folder) == before


def test_an_empty_folder_of_the_name_is_used(place: Places) -> None:
    here = place()
    here.run.mkdir(parents=True)
    assert here.main("--stage", "pretrain", "--max-steps", 1) == 0
    assert here.runs() == ["tiny"]


def test_a_folder_of_something_else_is_left_alone(place: Places, snapshot: Snapshot) -> None:
    here = place()
    here.run.mkdir(parents=True)
    (here.run / "thesis.tex").write_text("years of work")
    before = snapshot(here.run)
    assert here.main("--stage", "pretrain", "--max-steps", 1) == 0
    assert snapshot(here.run) == before
    assert len(here.runs()) == 2


def test_a_damaged_config_file_is_another_run(place: Places, tiny_run: Any) -> None:
    here = place(tiny_run.run)
    (here.run / "config.json").write_text("{")
    assert here.main("--stage", "pretrain", "--max-steps", 1) == 0
    assert len(here.runs()) == 2
    assert (here.run / "config.json").read_text() == "{"


def test_the_run_folder_is_private(place: Places) -> None:
    here = place()
    assert here.main("--stage", "pretrain", "--max-steps", 1) == 0
    assert here.run.stat().st_mode & 0o777 == 0o750
    assert (here.run / "pretrain" / "final").stat().st_mode & 0o777 == 0o750


# --- one stage from a checkpoint


def test_a_stage_starts_alone_from_a_checkpoint(
    place: Places, tiny_run: Any, snapshot: Snapshot, equal_weights: Equal
) -> None:
    here, parent = place(), tiny_run.run / "sft" / "final"
    arguments = ("--stage", "dpo", "--checkpoint", parent)
    assert here.main(*arguments) == 0
    assert {path.name for path in here.run.iterdir() if path.is_dir()} == {"dpo"}
    assert read(here.run / "dpo" / "result.json")["parent"]["path"] == str(parent)
    assert equal_weights(here.run / "dpo" / "final", tiny_run.run / "dpo" / "final")
    before = snapshot(here.folder)
    assert here.main(*arguments) == 0
    assert snapshot(here.folder) == before
    assert here.main("--stage", "verifier") == 0  # the next stage finds its own parent
    record = read(here.run / "verifier" / "stage.json")["parent"]
    assert record["path"] == str(here.run / "dpo" / "final")


def test_the_chain_joins_a_stage_whose_parent_it_comes_to(
    place: Places, tiny_run: Any, snapshot: Snapshot
) -> None:
    """The parent came from elsewhere, but from the same config: trained here it is the same."""
    here = place()
    assert here.main("--stage", "dpo", "--checkpoint", tiny_run.run / "sft" / "final") == 0
    before = snapshot(here.run / "dpo")
    assert here.main() == 0
    assert snapshot(here.run / "dpo") == before
    assert read(here.run / "eval" / "result.json")["status"] == "finished"


def test_a_stage_from_another_parent_is_refused_before_any_work(
    place: Places, tiny_run: Any, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    assert here.main("--stage", "dpo", "--checkpoint", tiny_run.run / "pretrain" / "final") == 0
    before = snapshot(here.folder)
    capsys.readouterr()
    told = "holds this stage from another parent checkpoint"
    assert here.main("--stage", "dpo", "--checkpoint", tiny_run.run / "sft" / "final") == 6
    assert told in capsys.readouterr().err
    assert here.main() == 6
    assert told in capsys.readouterr().err
    assert snapshot(here.folder) == before
    assert here.main("--force") == 0
    assert read(here.run / "dpo" / "stage.json")["parent"]["stage"] == "sft"


def test_the_verifiers_trunk_is_no_parent(
    place: Places, tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    assert here.main("--stage", "dpo", "--checkpoint", tiny_run.run / "verifier" / "final") == 4
    assert "does not fit this model" in capsys.readouterr().err
    assert not (here.folder / "runs").exists()


def test_a_parent_of_another_architecture_is_refused(
    place: Places, tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    parent = tiny_run.run / "sft" / "final"
    changes = ("model.d_ff=64", "model.norm=layernorm")
    assert here.main("--stage", "dpo", "--checkpoint", parent, *changes) == 4
    told = capsys.readouterr().err
    assert "model.d_ff is" in told and "model.norm is" in told and "64 here" in told
    assert not (here.folder / "runs").exists()


def test_a_checkpoint_needs_a_stage(
    place: Places, tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place().main("--checkpoint", tiny_run.run / "sft" / "final") == 2
    assert "--checkpoint needs --stage" in capsys.readouterr().err


def test_a_stage_without_its_parent_says_what_to_do(
    place: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    assert here.main("--stage", "dpo") == 4
    told = capsys.readouterr().err
    assert "run --stage sft first, or give --checkpoint PATH" in told
    assert not (here.folder / "runs").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_altered_parent_is_refused(
    place: Places, tiny_run: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    here = place(tiny_run.run)
    shutil.rmtree(here.run / "dpo")
    path = here.run / "sft" / "final" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert here.main("--stage", "dpo") == 4
    assert f"{path} was altered" in capsys.readouterr().err
    assert here.main() == 4  # also in the chain, where the stage before stands
    assert not (here.run / "dpo").exists()


def test_eval_of_one_checkpoint(place: Places, tiny_run: Any) -> None:
    here = place()
    parent = tiny_run.run / "sft" / "final"
    assert here.main("--checkpoint", parent, command="eval") == 0
    result = read(here.run / "eval" / "result.json")
    (model,) = result["models"]
    assert model["stage"] == "sft"
    whole = read(tiny_run.run / "eval" / "result.json")["models"][1]
    assert (model["scores"], model["samples"]) == (whole["scores"], whole["samples"])
    assert result["reasoning"]["policy"] == "sft"
    assert result["reasoning"]["auroc"] is None  # there is no verifier


def test_eval_of_nothing_says_so(place: Places, capsys: pytest.CaptureFixture[str]) -> None:
    here = place()
    assert here.main(command="eval") == 4
    assert "nothing to evaluate" in capsys.readouterr().err
    assert not (here.folder / "runs").exists()


# --- eval follows the checkpoints


def evaluated(run: Path) -> dict[str, str]:
    """Hash of the checkpoint that eval scored, by stage."""
    models = read(run / "eval" / "result.json")["models"]
    return {model["stage"]: model["checkpoint"]["sha256"] for model in models}


def finals(run: Path) -> dict[str, str]:
    names = ("pretrain", "sft", "dpo")
    folders = {name: run / name / "final" / "manifest.json" for name in names}
    return {name: sha256_file(path) for name, path in folders.items() if path.exists()}


def metrics_of(run: Path, stage: str) -> dict[str, float]:
    models = read(run / "eval" / "result.json")["models"]
    scores = next(model["scores"] for model in models if model["stage"] == stage)
    return {score["metric"]: score["value"] for score in scores}


def test_eval_is_done_again_when_there_is_more_to_evaluate(
    place: Places, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    assert here.main("--stage", "pretrain") == here.main("--stage", "eval", report=True) == 0
    old = snapshot(here.run / "eval")
    assert list(evaluated(here.run)) == ["pretrain"]
    capsys.readouterr()
    assert here.main(report=True) == 0
    assert evaluated(here.run) == finals(here.run)
    assert list(evaluated(here.run)) == ["pretrain", "sft", "dpo"]
    (backup,) = here.run.glob("eval.bak-*")
    assert snapshot(backup) == old

    # The report of the whole run is beside that of its first stage, and is the one that is named.
    first = here.folder / "report" / "tiny_report.md"
    (newest,) = (path for path in first.parent.glob("*.md") if path != first)
    assert "Finished: pretrain, eval." in first.read_text()
    assert "Finished: pretrain, sft, dpo, verifier, eval." in newest.read_text()
    assert f"report: {newest}\n" in capsys.readouterr().out
    before = snapshot(here.folder)
    assert here.main(report=True) == 0
    assert f"report: {newest}\n" in capsys.readouterr().out
    assert snapshot(here.folder) == before


def test_a_report_that_was_missed_is_written_later(
    place: Places, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process ended between a stage and its report, and an older report stands."""
    here = place()
    assert here.main("--stage", "pretrain", report=True) == here.main("--stage", "eval") == 0
    assert here.main("--stage", "eval", report=True) == 0
    first = here.folder / "report" / "tiny_report.md"
    (newest,) = (path for path in first.parent.glob("*.md") if path != first)
    assert "Finished: pretrain, eval." in newest.read_text()
    assert f"report: {newest}\n" in capsys.readouterr().out


def test_eval_is_done_again_when_a_checkpoint_was_replaced(
    place: Places, tiny_run: Any, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    here = place(tiny_run.run)
    old, before = evaluated(here.run), snapshot(here.run / "eval")
    parent = ("--checkpoint", here.run / "pretrain" / "final")
    assert here.main("--stage", "dpo", *parent, "--force") == 0
    assert finals(here.run)["dpo"] != old["dpo"]
    assert here.main("--stage", "eval", "--no-overwrite") == 0
    assert snapshot(here.run / "eval") == before
    assert "is of other checkpoints than now; left" in caplog.text

    assert here.main("--stage", "eval") == 0
    assert evaluated(here.run) == finals(here.run)
    (backup,) = here.run.glob("eval.bak-*")
    assert snapshot(backup) == before
    # What dpo is compared with is the policy that it was tuned from.
    assert "implicit_reward_accuracy" in metrics_of(here.run, "dpo")
    told = {
        row["what"]: row["why"] for row in read(here.run / "eval" / "result.json")["not_evaluated"]
    }
    assert "another checkpoint than this policy" in told["choice by the verifier"]
    reasoning = read(here.run / "eval" / "result.json")["reasoning"]
    assert reasoning["verifier_sha256"] is None and reasoning["auroc"] is None


def test_a_policy_is_not_compared_with_what_it_was_not_tuned_from(
    place: Places, tiny_run: Any
) -> None:
    assert "implicit_reward_accuracy" in metrics_of(tiny_run.run, "dpo")
    here = place(tiny_run.run)
    shutil.rmtree(here.run / "sft")
    shutil.copytree(here.run / "pretrain", here.run / "sft")  # any policy but that of dpo
    assert here.main("--stage", "eval") == 0
    assert "implicit_reward_accuracy" not in metrics_of(here.run, "dpo")
    result = read(here.run / "eval" / "result.json")
    told = {row["what"]: row["why"] for row in result["not_evaluated"]}
    assert "was tuned from is not evaluated" in told["implicit_reward_accuracy"]
    assert result["reasoning"]["verifier_sha256"]  # which is of this policy


# --- stopping and going on


def stop_in(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, number: int) -> None:
    """Send this process a signal inside a step of a stage."""
    train_step = Trainer.train_step

    def signalled(self: Trainer, batches: Any) -> Any:
        stats = train_step(self, batches)
        if self.folder.name == stage and self.progress.step == step:
            os.kill(os.getpid(), number)
        return stats

    monkeypatch.setattr(Trainer, "train_step", signalled)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_the_next_start_goes_on(
    place: Places, tiny_run: Any, equal_weights: Equal, number: int, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here = place()
    parent = ("--stage", "dpo", "--checkpoint", tiny_run.run / "sft" / "final")
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, "dpo", 1, number)
        assert here.main(*parent) == 75
    assert "after step 1; saved" in capsys.readouterr().err
    assert not (here.run / "dpo" / "result.json").exists()
    assert [p.name for p in (here.run / "dpo" / "checkpoints").iterdir()] == ["step-00000001"]

    assert here.main(*parent, "--resume") == 0
    assert equal_weights(here.run / "dpo" / "final", tiny_run.run / "dpo" / "final")
    rows = [json.loads(s) for s in (here.run / "dpo" / "metrics.jsonl").read_text().splitlines()]
    stops = [row["status"] for row in rows if row["kind"] == "stop"]
    assert stops == [f"signal:{signal.Signals(number).name}", "finished"]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
    assert read(here.run / "dpo" / "result.json")["provenance"]["restarts"] == 1


def test_a_forced_stage_that_was_stopped_goes_on_without_force(
    place: Places, tiny_run: Any, equal_weights: Equal, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place(tiny_run.run)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, "dpo", 2, signal.SIGTERM)
        assert here.main("--stage", "dpo", "--force") == 75
    assert "the same command goes on from there (without --force)" in capsys.readouterr().err
    assert here.main("--stage", "dpo", "--resume", "--force") == 2
    assert here.main("--stage", "dpo") == 0
    assert len(list(here.run.glob("dpo.bak-*"))) == 1
    assert read(here.run / "dpo" / "result.json")["provenance"]["restarts"] == 1
    assert equal_weights(here.run / "dpo" / "final", tiny_run.run / "dpo" / "final")


def test_a_signal_in_the_last_step_is_not_lost(place: Places, tiny_run: Any) -> None:
    """It must not be answered by the start of the next stage."""
    here = place(tiny_run.run)
    for stage in ("dpo", "verifier", "eval"):
        shutil.rmtree(here.run / stage)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, "dpo", 3, signal.SIGTERM)
        assert here.main() == 75
    assert not (here.run / "verifier").exists()
    assert here.main() == 0
    assert read(here.run / "verifier" / "result.json")["status"] == "finished"


def test_a_signal_while_sampling_stops_at_once(
    place: Places, tiny_run: Any, equal_weights: Equal, capsys: pytest.CaptureFixture[str]
) -> None:
    from modern_llm.alignment.stages import verifier

    here = place(tiny_run.run)
    for stage in ("verifier", "eval"):
        shutil.rmtree(here.run / stage)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier, "sample_texts", interrupted)
        assert here.main() == 75
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert here.main() == 0
    assert equal_weights(here.run / "verifier" / "final", tiny_run.run / "verifier" / "final")


def test_a_resumed_dpo_keeps_its_reference(
    place: Places, tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the policy is compared with never becomes the trained policy."""
    from modern_llm.alignment import reference
    from modern_llm.alignment.stages import dpo

    here, used = place(), []
    objective = dpo.DPOObjective

    def noted(options: Any, reference_P2: torch.Tensor) -> Any:
        used.append(reference_P2.clone())
        return objective(options, reference_P2)

    monkeypatch.setattr(dpo, "DPOObjective", noted)
    parent = ("--stage", "dpo", "--checkpoint", tiny_run.run / "sft" / "final")
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, "dpo", 2, signal.SIGTERM)
        assert here.main(*parent) == 75
    first, used[:] = list(used), []

    def refuse(*args: Any) -> None:
        raise AssertionError("the reference was computed again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "collate_pairs", refuse)
        assert here.main(*parent) == 0
    lengths = {len(values) for values in first}
    assert lengths == {len(values) for values in used} and len(lengths) == 2
    for values in used:
        assert any(len(v) == len(values) and torch.equal(v, values) for v in first)
    rows = [json.loads(s) for s in (here.run / "dpo" / "metrics.jsonl").read_text().splitlines()]
    (loss,) = (row["loss"] for row in rows if row["kind"] == "train" and row["step"] == 1)
    assert loss == pytest.approx(0.693147, abs=1e-5)
    start = next(row for row in rows if row["kind"] == "eval")
    assert start["step"] == 0 and start["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_changed_data_is_refused_unless_allowed(
    place: Places, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "book.txt"
    text.write_text("\n---\n".join(f"Page {n} says the same old thing again." for n in range(300)))
    source = {"name": "text", "path": str(text), "separator": "---"}
    here = place(None, {"pretrain.data": [source]})
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, "pretrain", 2, signal.SIGTERM)
        assert here.main("--stage", "pretrain") == 75
    checkpoint = here.run / "pretrain" / "checkpoints" / "step-00000002"
    tokenizer = (checkpoint / "tokenizer.json").read_bytes()
    capsys.readouterr()

    content = text.read_text()
    text.write_text(content.replace("again", "AGAIN").replace("Page", "Paper"))
    assert here.main("--stage", "pretrain") == 3
    told = capsys.readouterr().err
    assert "the training data or its order changed" in told and "--allow-data-change" in told
    assert not (here.run / "pretrain" / "final").exists()

    # Weights know the ids of their own tokenizer, whatever the new text would give.
    assert here.main("--stage", "pretrain", "--allow-data-change") == 0
    final = here.run / "pretrain" / "final"
    assert (final / "tokenizer.json").read_bytes() == tokenizer
    state = read_trainer_state(
        here.run / "pretrain" / "checkpoints" / "step-00000004" / "trainer.pt"
    )
    assert state["progress"]["step"] == 4


def test_a_run_that_diverges_publishes_nothing(
    place: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    changes = ("pretrain.training.lr=1e30", "pretrain.training.warmup=0", "training.save_every=1")
    assert here.main("--stage", "pretrain", *changes) == 5
    told = capsys.readouterr().err
    assert "grad_norm=nan; lower training.lr, or look at the data; last good checkpoint:" in told
    assert told.rstrip().endswith("step-00000001")
    assert not (here.run / "pretrain" / "final").exists()
    for checkpoint in (here.run / "pretrain").glob("checkpoints/step-*"):
        weights = read_checkpoint(checkpoint).weights
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


# --- the same chain for other models and options


VARIANTS: dict[str, dict[str, Any]] = {
    "experts": {"model.moe": {"n_experts": 3, "top_k": 2}, "training.eval_every": 1},
    "gpt-2 shape, ipo, replay": {
        "model.position": "learned", "model.norm": "layernorm", "model.ffn": "standard",
        "model.bias": True, "model.tie_embeddings": False, "dpo.loss": "ipo", "data.replay": 0.5,
    },
    "window, documents apart, muon, bf16": {
        "model.attention": "window", "model.window": 24, "model.n_sinks": 2,
        "training.doc_mask": True, "training.optimizer": "muon", "training.precision": "bf16",
        "training.micro_batch_size": 2, "training.activation_checkpointing": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_stage_runs_with(place: Places, variant: str) -> None:
    here = place(None, VARIANTS[variant])
    assert here.main() == 0
    for stage in TRAINED:
        training = read(here.run / stage / "result.json")["training"]
        assert training["steps"] == (4 if stage == "pretrain" else 3)
        assert training["final_loss"] > 0
    assert read(here.run / "eval" / "result.json")["status"] == "finished"


# --- from Python


def test_the_pipeline_says_what_it_ran(place: Places, tiny_run: Any) -> None:
    here = place(tiny_run.run)
    shutil.rmtree(here.run / "eval")
    outcome = AlignmentPipeline(load_config(here.config)).run()
    assert outcome is not None
    assert outcome.run == here.run
    assert outcome.ran == ("eval",)
    assert AlignmentPipeline(load_config(here.config)).run() is not None
    with pytest.raises(ConfigError, match="stage"):
        AlignmentPipeline(load_config(here.config)).run("rlhf")
