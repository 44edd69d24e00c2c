"""Studies of real trainings: what is read from them, how they resume, fail and stop."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment.stages.base import load_policy
from modern_llm.cli import main
from modern_llm.config import StudyConfig, as_overrides
from modern_llm.errors import ConfigError, DataError, ModernLLMError, StoppedBySignal
from modern_llm.experiments import (
    ArchitectureExperiment,
    ExperimentConfig,
    ExperimentResult,
    compare_experiments,
    load_results,
)
from modern_llm.experiments.cells import Cell
from modern_llm.experiments.experiment import _curve
from modern_llm.experiments.study import Study
from modern_llm.runtime.artifacts import sha256_file
from modern_llm.training.checkpoint import read_checkpoint
from modern_llm.training.handover import read_tokenizer

Make = Callable[..., StudyConfig]
Train = Callable[[Sequence[Cell]], None]
ARMS: dict[str, Any] = {"plain": {}, "rms": {"model.norm": "rmsnorm"}}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def cells_of(study: Study) -> list[Cell]:
    return [cell for experiment in study.experiments.values() for cell in experiment.cells]


# --- what is read -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    small: dict[str, Any], train_here: Train, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StudyConfig, Path]:
    """A study of two arms and two seeds whose cells are trained; read it, never change it."""
    output = tmp_path_factory.mktemp("trained")
    config = StudyConfig.model_validate(
        {"name": "small", "base": "gpt2", "overrides": small, "arms": ARMS, "seeds": [0, 1]}
    )
    train_here(cells_of(Study(config, output=output)))
    return config, output


def test_a_finished_study_is_compared_without_a_process(
    trained: tuple[StudyConfig, Path], no_processes: None
) -> None:
    config, output = trained

    outcome = Study(config, output=output).run(command="modern-llm experiment small.json")

    assert outcome.left_out == () and [r.name for r in outcome.results] == ["plain", "rms"]
    assert outcome.folder == output / "small" / "comparison"
    report = (outcome.folder / "report.md").read_text()
    assert "Run it again: `modern-llm experiment small.json`" in report
    assert "asked for: tokens trained on): tokens trained on" in report
    assert sorted(p.name for p in (output / "small" / "experiments").iterdir()) == [
        "plain.json", "rms.json",
    ]  # fmt: skip
    before = contents(output)
    assert Study(config, output=output).run(command="modern-llm experiment small.json") == outcome
    assert contents(output) == before, "the same again writes nothing"


def test_numbers_are_those_of_the_run(
    trained: tuple[StudyConfig, Path], no_processes: None
) -> None:
    config, output = trained

    results = Study(config, output=output).run().results

    for result in results:
        for one in result.seeds:
            run = Path(one.run)
            told = json.loads((run / "pretrain" / "result.json").read_text())
            assert json.loads((run / "config.json").read_text())["seed"] == one.seed
            weights = run / "pretrain" / "final" / "model.safetensors"
            assert one.model_size_mb == weights.stat().st_size / 1e6
            assert one.sha256 == read_checkpoint(weights.parent).sha256
            assert (one.steps, one.tokens) == (6, 6 * 4 * 32)
            assert one.train_time_s == told["training"]["seconds"] > 0
            passes = one.tokens / result.data["train_tokens"]
            assert one.epoch_time_s == pytest.approx(one.train_time_s / passes, rel=0.05)
            assert one.inference_tokens_per_s == told["inference"]["decode_tokens_per_s"]
            assert [(p.step, p.tokens) for p in one.curve] == [(0, 0), (3, 384), (6, 768)]
            assert one.curve[-1].loss == one.final_val_loss < one.curve[0].loss
        assert result.params == told["model"]["params"]
        assert result.hardware["threads"] == 1
    first, second = (one.final_val_loss for one in results[0].seeds)
    assert first != second, "seeds differ"


def test_points_between_train_rows_are_in_proportion() -> None:
    """Rows of training every 10 steps, passes every 25: 75 lies between 70 and 80."""
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "tokens": 64 * step, "time_s": 0.5 * step}
        for step in (1, *range(10, 101, 10))
    ]
    rows += [{"kind": "eval", "step": step, "loss": 5.0 - step / 100} for step in (0, 25, 75, 100)]

    curve = _curve(rows)

    assert [(p.step, p.tokens, p.seconds) for p in curve] == [
        (0, 0, 0.0), (25, 1600, 12.5), (75, 4800, 37.5), (100, 6400, 50.0),
    ]  # fmt: skip


# --- bits per byte ------------------------------------------------------------------------------

VALIDATION = ["Été à Łódź: 12 €.", "plain words, and more of them " * 9, "x"]


@pytest.fixture(scope="module")
def by_tokenizer(
    small: dict[str, Any], train_here: Train, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ExperimentResult]:
    """One text, read by bytes merged a little (``bpe``) and by characters (``char``)."""
    folder = tmp_path_factory.mktemp("texts")
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    texts = [f"{VALIDATION[i % 3]} {i}" for i in range(60)]
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    validation.write_text("".join(json.dumps({"text": text}) + "\n" for text in VALIDATION))
    source = {"name": "jsonl", "path": str(train), "validation_path": str(validation)}
    results = {}
    for tokenizer in ("bpe", "char"):
        changes = {"tokenizer.name": tokenizer, "pretrain.data": [source]}
        overrides = as_overrides({**small, **changes})
        config = ExperimentConfig(tokenizer, overrides=overrides, output=folder / "cells")
        train_here(ArchitectureExperiment(config).cells)
        results[tokenizer] = ArchitectureExperiment(config).run()
    return results


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_bits_per_byte_are_those_of_every_token_over_the_bytes_of_the_text(
    tokenizer: str, by_tokenizer: dict[str, ExperimentResult]
) -> None:
    """In float64, a token at a time: <bos> text <eos> of all documents, in windows of 32."""
    (one,) = by_tokenizer[tokenizer].seeds
    checkpoint = read_checkpoint(Path(one.run) / "pretrain" / "final")
    model = load_policy(checkpoint, torch.device("cpu")).double()
    encoder = read_tokenizer(checkpoint)
    ids = [
        token
        for text in VALIDATION
        for token in [encoder.bos_id, *encoder.encode(text), encoder.eos_id]
    ]
    nats, scored = 0.0, 0
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, 32):
            window = torch.tensor(ids[begin : begin + 33])
            logits_TV = model(window[None, :-1])[0].double()
            for logit_V, target in zip(logits_TV, window[1:], strict=True):
                nats += float(torch.logsumexp(logit_V, 0) - logit_V[target])
                scored += 1
    n_bytes = sum(len(text.encode()) for text in VALIDATION)

    assert n_bytes > sum(map(len, VALIDATION)), "characters are not bytes here"
    assert scored % 32, "the last window is short, so a mean of windows would differ"
    assert one.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert one.final_val_loss == pytest.approx(nats / scored, rel=1e-5)
    assert by_tokenizer[tokenizer].data["validation_bytes"] == n_bytes


def test_two_tokenizers_compare_in_bits_per_byte_only(
    by_tokenizer: dict[str, ExperimentResult],
) -> None:
    results = list(by_tokenizer.values())

    with pytest.raises(ConfigError, match="different tokenizers: compare bits_per_byte"):
        compare_experiments(results)
    frame = compare_experiments(results, metric="bits_per_byte")

    assert list(frame["experiment"]) == ["bpe", "char"]
    assert frame.iloc[1]["difference"] == pytest.approx(
        results[1].seeds[0].bits_per_byte - results[0].seeds[0].bits_per_byte
    )


def test_changed_text_is_another_cell_and_does_not_compare(
    small: dict[str, Any], train_here: Train, no_processes: None, tmp_path: Path
) -> None:
    """The config names the file only: what was trained on its old content must not stand in."""
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    train.write_text("".join(json.dumps({"text": f"text {i} " * 9}) + "\n" for i in range(40)))
    source = {"name": "jsonl", "path": str(train), "validation_path": str(validation)}
    overrides = as_overrides({**small, "pretrain.data": [source]})
    results = []
    for name, text in (("old", "what is held out, of old"), ("new", "what is held out, of new")):
        validation.write_text(json.dumps({"text": text}) + "\n")
        config = ExperimentConfig("a", overrides=overrides, output=tmp_path / "cells")
        experiment = ArchitectureExperiment(config)
        assert not experiment.cells[0].finished
        train_here(experiment.cells)
        results.append(replace(experiment.run(), name=name))

    assert results[0].seeds[0].sha256 != "" and results[0].data != results[1].data
    for metric in ("final_val_loss", "bits_per_byte"):
        with pytest.raises(ConfigError, match="different validation texts"):
            compare_experiments(results, metric=metric)


# --- shares -------------------------------------------------------------------------------------


def test_shares_train_every_cell_once_and_the_study_then_nothing(
    make_study: Make, train_here: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_study({**ARMS, "same": {}}, seeds=[0, 1])
    trained = list[str]()

    def train(cells: Sequence[Cell], **_: Any) -> dict[str, str]:
        todo = [cell for cell in cells if not cell.finished]
        trained.extend(cell.name for cell in todo)
        train_here(todo)
        return {}

    monkeypatch.setattr("modern_llm.experiments.study.run_cells", train)
    shares = [Study(config, output=tmp_path).train_share(i, 3)[0] for i in (1, 2, 3)]

    names = [cell.name for share in shares for cell in share]
    assert sorted(names) == sorted(set(names)) == sorted(trained)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert set(names) == {cell.name for cell in cells_of(Study(config, output=tmp_path))}
    assert not (tmp_path / "small" / "comparison").exists()
    assert Study(config, output=tmp_path).run().folder == tmp_path / "small" / "comparison"
    assert len(trained) == len(names), "nothing was left to train"


def test_equal_seconds_are_not_divided(make_study: Make, tmp_path: Path) -> None:
    config = make_study(ARMS, hold="seconds", speed_rounds=1)
    with pytest.raises(ConfigError, match="on one machine"):
        Study(config, output=tmp_path).train_share(1, 2)


@pytest.mark.parametrize("share", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_a_share_that_cannot_be_is_refused(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["experiment", "heads", f"--cells={share}"])
    assert stop.value.code == 2
    assert "I/N with I from 1 to N" in capsys.readouterr().err


# --- failures -----------------------------------------------------------------------------------


def test_an_arm_without_its_data_is_left_out_and_told(
    make_study: Make, train_here: Train, no_processes: None, tmp_path: Path
) -> None:
    lost = {"pretrain.data": [{"name": "jsonl", "path": str(tmp_path / "none.jsonl")}]}
    study = Study(make_study({**ARMS, "lost": lost}), output=tmp_path / "out")
    train_here(cells_of(study))

    outcome = study.run()

    assert [result.name for result in outcome.results] == ["plain", "rms"]
    (told,) = outcome.left_out
    assert told.startswith("lost: ") and "none.jsonl" in told
    assert outcome.folder is not None
    report = (outcome.folder / "report.md").read_text()
    assert "- lost: " in report.split("## Without a result")[1]


def test_without_any_data_the_reason_is_the_error(make_study: Make, tmp_path: Path) -> None:
    lost = {"pretrain.data": [{"name": "jsonl", "path": str(tmp_path / "none.jsonl")}]}
    study = Study(make_study(ARMS, overrides=lost), output=tmp_path / "out")

    with pytest.raises(DataError, match=r"none\.jsonl"):
        study.run()


def test_a_seed_without_a_result_is_told_and_the_others_are_compared(
    make_study: Make, train_here: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = Study(make_study(ARMS, seeds=[0, 1, 2]), output=tmp_path)
    rms = study.experiments["rms"].cells
    train_here([cell for cell in cells_of(study) if cell is not rms[2]])
    why = {rms[2].name: "exit code 5: error: loss=nan"}
    monkeypatch.setattr("modern_llm.experiments.study.run_cells", lambda *_, **__: why)

    outcome = study.run()

    plain, other = outcome.results
    assert len(plain.seeds) == 3 and [one.seed for one in other.seeds] == [0, 1]
    assert other.failed == {"2": "exit code 5: error: loss=nan"}
    assert outcome.folder is not None
    record = json.loads((outcome.folder / "comparison.json").read_text())
    assert record["rows"][1]["n"] == 2
    shared = [other.seeds[i].final_val_loss - plain.seeds[i].final_val_loss for i in (0, 1)]
    assert record["rows"][1]["difference"] == pytest.approx(sum(shared) / 2)
    assert "- `rms`, seed 2: exit code 5" in (outcome.folder / "report.md").read_text()


def test_with_one_arm_left_there_is_no_comparison(
    make_study: Make, train_here: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = Study(make_study(ARMS), output=tmp_path)
    train_here(study.experiments["plain"].cells)
    monkeypatch.setattr("modern_llm.experiments.study.run_cells", lambda *_, **__: {})

    outcome = study.run()

    assert outcome.folder is None and outcome.left_out == ("rms: not trained",)
    assert [result.name for result in outcome.results] == ["plain"]


def test_an_experiment_without_a_result_says_why(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = ExperimentConfig("a", overrides=as_overrides(small), output=tmp_path, seeds=[3])
    experiment = ArchitectureExperiment(config)
    why = {experiment.cells[0].name: "exit code 5: error: loss=nan"}
    monkeypatch.setattr("modern_llm.experiments.experiment.run_cells", lambda *_, **__: why)

    with pytest.raises(ModernLLMError, match="a: no seed has a result\n  seed 3: exit code 5"):
        experiment.run()

    assert not (tmp_path / "experiments").exists()


def test_an_arm_whose_speed_fails_costs_itself_alone(
    make_study: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def speed(self: Study, name: str, turn: int) -> dict[str, float]:
        if name == "rms" and turn == 1:
            raise ModernLLMError("speed of rms: exit code 5: error: loss=nan")
        return {"tokens_per_s": 100.0}

    monkeypatch.setattr(Study, "_speed", speed)
    arms = {**ARMS, "deep": {"model.n_layers": 2}}
    study = Study(make_study(arms, hold="seconds", speed_rounds=2), output=tmp_path)

    assert list(study.experiments) == ["plain", "deep"]
    assert study.left_out == ["speed of rms: exit code 5: error: loss=nan"]
    reference = make_study(arms, hold="seconds", speed_rounds=2, reference="rms")
    with pytest.raises(ModernLLMError, match="speed of rms"):
        Study(reference, output=tmp_path).run()


# --- stops --------------------------------------------------------------------------------------


def test_a_signal_while_text_is_prepared_is_a_stop(
    make_study: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def prepare(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("modern_llm.experiments.experiment.prepare_text", prepare)

    with pytest.raises(StoppedBySignal, match="SIGTERM"):
        Study(make_study(ARMS), output=tmp_path).run()


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split(") ")[1][0] != "Z"


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_to_the_weights_of_an_undisturbed_one(
    small: dict[str, Any], cli: Any, train_here: Train, tmp_path: Path
) -> None:
    steps = {"pretrain.training.max_steps": 400, "pretrain.training.eval_every": 0}
    raw = {"base": "gpt2", "overrides": {**small, **steps}, "arms": ARMS, "seeds": [0]}
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(raw))
    config = StudyConfig.model_validate({"name": "sweep", **raw})
    undisturbed = cells_of(Study(config, output=tmp_path / "undisturbed"))
    train_here(undisturbed)
    stopped = cells_of(Study(config, output=tmp_path / "stopped"))
    arguments = ["experiment", file, "--output-dir", tmp_path / "stopped", "--jobs", "1"]

    command = [sys.executable, "-m", "modern_llm", *map(str, arguments)]
    sweep = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics, end = stopped[0].folder / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and '"step": 20,' in metrics.read_text()):
        assert sweep.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    children = children_of(sweep.pid)
    sweep.send_signal(signal.SIGTERM)
    _, told = sweep.communicate(timeout=60)

    assert sweep.returncode == 75, told
    assert "error: SIGTERM: 0 of 2 trainings are finished" in told
    assert children and not any(alive(child) for child in children)
    assert list((stopped[0].folder / "checkpoints").iterdir()), "it has saved"
    assert not stopped[1].folder.exists()

    done = cli(*arguments)

    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout and "one seed: no verdict" in done.stdout
    for one, other in zip(stopped, undisturbed, strict=True):
        result = json.loads((one.folder / "result.json").read_text())
        assert result["training"]["restarts"] == (1 if one is stopped[0] else 0)
        hashes = {sha256_file(cell.folder / "final" / "model.safetensors") for cell in (one, other)}
        assert len(hashes) == 1


# --- the command line ---------------------------------------------------------------------------


def test_compare_architectures_reads_what_a_study_left(
    trained: tuple[StudyConfig, Path],
    no_processes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, output = trained
    Study(config, output=output).run()
    assert {result.name for result in load_results(output)} == {"plain", "rms"}
    arguments = ["compare-architectures", "rms", "plain", "--results", str(output)]

    assert main([*arguments, "--output-dir", str(tmp_path), "--name", "again"]) == 0

    told = capsys.readouterr().out
    assert f"report: {tmp_path / 'again' / 'report.md'}" in told
    assert json.loads((tmp_path / "again" / "comparison.json").read_text())["reference"] == "rms"
    named = [*arguments, "--output-dir", str(tmp_path), "--name", "other", "--reference", "plain"]
    assert main(named) == 0
    assert json.loads((tmp_path / "other" / "comparison.json").read_text())["reference"] == "plain"
