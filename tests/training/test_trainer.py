import errno
import json
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modern_llm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ProtectedPathError,
    StoppedBySignal,
)
from modern_llm.runtime.artifacts import to_json
from modern_llm.training import (
    FirstLoss,
    LMObjective,
    Terms,
    Trainer,
    checkpoint,
    list_checkpoints,
    model_weights,
    read_checkpoint,
    verify_checkpoint,
)
from modern_llm.training.checkpoint import FORMAT
from modern_llm.training.throughput import Work

Trainers = Callable[..., Trainer]
TIMING = (
    *("tokens_per_s", "tflops", "mfu", "step_s", "time_s", "seconds"),
    *("memory_gb", "memory_peak_gb"),
)


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Rows of one kind without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] == kind]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in found]


def same_weights(a: Path, b: Path) -> bool:
    left, right = read_checkpoint(a).weights, read_checkpoint(b).weights
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class StopAt(LMObjective):
    """Sends this process a signal inside step ``step`` (from 1)."""

    def __init__(self, step: int, number: int, n_micro: int = 2) -> None:
        super().__init__()
        self.left, self.number = step * n_micro, number

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().__call__(model, batch)


def test_a_run_learns_saves_and_tells(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    result = make_trainer(
        folder, max_steps=40, save_every=10, log_every=5, lr=1e-2, work=Work(8e4, 2e4)
    ).fit()
    told = rows(folder)
    assert [row["step"] for row in told] == [1, *range(5, 41, 5)]
    assert told[0]["loss"] == pytest.approx(math.log(32), abs=0.3)
    assert result.final_loss == told[-1]["loss"]
    assert [f.name for f in list_checkpoints(folder / "checkpoints")] == [
        "step-00000030",
        "step-00000040",
    ]
    assert (result.steps, result.tokens) == (40, 40 * 4 * 8)
    assert told[-1]["tokens"] == 40 * 4 * 8
    assert 0 < told[-1]["units"] < told[-1]["tokens"]
    assert result.checkpoint == folder / "final"
    assert result.sha256 == read_checkpoint(folder / "final").sha256
    assert result.mfu is not None
    assert 0 < result.mfu < 1
    assert result.tokens_per_s > 0
    assert not (folder / "final" / "trainer.pt").exists()
    (start,), (stop,) = rows(folder, "start"), rows(folder, "stop")
    assert start["data_fingerprint"] == "data-1"
    assert start["resumed_from"] is None
    assert {"config_sha256", "git_commit", "versions", "seed", "time"} <= start.keys()
    assert stop["status"] == "finished"
    assert len(rows(folder, "save")) == 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop_after", [1, 4, 6, 11])
def test_stop_and_resume_is_bit_exact(
    make_trainer: Trainers, tmp_path: Path, optimizer: str, stop_after: int
) -> None:
    whole = make_trainer(tmp_path / "a" / "pretrain", optimizer=optimizer).fit()
    halves = tmp_path / "b" / "pretrain"
    interrupted = make_trainer(
        halves, optimizer=optimizer, objective=StopAt(stop_after, signal.SIGTERM)
    )
    with pytest.raises(StoppedBySignal, match=f"SIGTERM after step {stop_after}; saved"):
        interrupted.fit()
    torch.manual_seed(123)  # a new process has another random state, and draws from it
    resumed = make_trainer(halves, optimizer=optimizer)
    result = resumed.fit()
    assert same_weights(whole.checkpoint, result.checkpoint)
    assert rows(tmp_path / "a" / "pretrain") == rows(halves)
    assert resumed.loader.asked == list(range(stop_after, 12))
    assert (result.tokens, result.final_loss) == (whole.tokens, whole.final_loss)
    assert (whole.restarts, result.restarts) == (0, 1)
    states = [
        read_checkpoint(f / "checkpoints" / "step-00000012").trainer_state()
        for f in (tmp_path / "a" / "pretrain", halves)
    ]
    assert torch.equal(states[0]["rng"][0]["torch"], states[1]["rng"][0]["torch"])
    moments = [s["update"]["optimizer"]["states"] for s in states]
    for one, other in zip(*moments, strict=True):
        for key in one:
            assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


def looks(trainers: Trainers, folder: Path, *, signal_in: str = "", **options: Any) -> Trainer:
    """A run that evaluates and samples every 4 steps; a signal comes in the named hook call."""
    seen: list[str] = []

    def hook(name: str, model: nn.Module, calls: list[str]) -> None:
        torch.rand(3)  # a hook that draws must not change the run
        calls.append(name)
        if f"{name} {calls.count(name)}" == signal_in:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(model: nn.Module) -> dict[str, float]:
        hook("eval", model, seen)
        seen.append("whole eval")
        return {"loss": float(model.embedding.weight.norm())}  # type: ignore[union-attr,operator]

    def sample(model: nn.Module) -> dict[str, str]:
        hook("sample", model, seen)
        return {"text": f"{float(model.embedding.weight.sum()):.6f}"}  # type: ignore[union-attr,operator]

    every = {"eval_every": 4, "sample_every": 4, "save_every": 4}
    made = trainers(folder, evaluate=evaluate, sample=sample, **{**every, **options})
    made.seen = seen  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("stop", "at", "evaluated"),
    [
        ({"objective": 4}, 4, 1),  # in the step that an evaluation follows
        ({"objective": 12}, 12, 1),  # in the last one
        ({"signal_in": "eval 1"}, 0, 0),  # before the first step
        ({"signal_in": "eval 2"}, 4, 1),
        ({"signal_in": "eval 4"}, 12, 3),
        ({"signal_in": "sample 2"}, 8, 3),
    ],
)
def test_a_stop_does_not_wait_for_evaluation_and_the_next_start_does_it(
    make_trainer: Trainers, tmp_path: Path, stop: dict[str, Any], at: int, evaluated: int
) -> None:
    whole = looks(make_trainer, tmp_path / "a" / "pretrain").fit()
    folder = tmp_path / "b" / "pretrain"
    options = dict(stop)
    if "objective" in stop:
        options["objective"] = StopAt(stop["objective"], signal.SIGTERM)
        evaluated = (at - 1) // 4 + 1
    first = looks(make_trainer, folder, **options)
    with pytest.raises(StoppedBySignal, match=f"SIGTERM after step {at}; saved"):
        first.fit()
    assert first.seen.count("whole eval") == evaluated  # type: ignore[attr-defined]
    assert list_checkpoints(folder / "checkpoints")[-1].name == f"step-{at:08d}"
    assert [row["step"] for row in rows(folder)] == [*range(1, at + 1)]
    assert first.model.training

    again = looks(make_trainer, folder)
    result = again.fit()
    for kind in ("train", "eval", "sample"):
        assert rows(tmp_path / "a" / "pretrain", kind) == rows(folder, kind)
    assert again.seen.count("whole eval") == 4 - evaluated  # type: ignore[attr-defined]
    assert (result.sha256, result.best) == (whole.sha256, whole.best)
    assert again.loader.asked == [*range(at, 12)]


def test_the_best_checkpoint_is_kept_though_it_was_saved_before_its_evaluation(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    folder, losses = tmp_path / "pretrain", iter([9.0, 1.0, 5.0, 5.0, 5.0, 5.0])

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": next(losses)}

    options = {"evaluate": evaluate, "eval_every": 4, "save_every": 4, "max_steps": 20}
    for steps in (4, 6):
        with pytest.raises(StoppedBySignal):
            make_trainer(folder, objective=StopAt(steps, signal.SIGTERM), **options).fit()
    result = make_trainer(folder, **options).fit()
    assert result.best == {"step": 4, "loss": 1.0}
    kept = [f.name for f in list_checkpoints(folder / "checkpoints")]
    assert kept[0] == "step-00000004"


def test_a_signal_while_a_checkpoint_is_begun_is_answered_after_the_next_step(
    make_trainer: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being written is published and told before the stop is."""
    folder = tmp_path / "pretrain"
    trainer = make_trainer(folder, save_every=4)
    start = trainer.saver.start

    def signalled(*args: Any, **kwargs: Any) -> None:
        start(*args, **kwargs)
        if args[0] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.saver, "start", signalled)
    with pytest.raises(StoppedBySignal, match="SIGTERM after step 5; saved"):
        trainer.fit()
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [(row["kind"], row["step"]) for row in told if row["kind"] in ("save", "stop")]
    assert ends == [("save", 4), ("save", 5), ("stop", 5)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_finish_the_step_save_and_ask_for_a_restart(
    make_trainer: Trainers, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "sft"
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal) as told:
        make_trainer(folder, objective=StopAt(2, number), save_every=0).fit()
    assert told.value.exit_code == 75
    assert signal.getsignal(number) is before
    assert [f.name for f in list_checkpoints(folder / "checkpoints")] == ["step-00000002"]
    assert rows(folder, "stop")[0]["status"] == f"signal:{number.name}"
    assert not (folder / "final").exists()


def test_a_signal_in_the_last_step_lets_the_run_finish(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    result = make_trainer(tmp_path / "sft", objective=StopAt(12, signal.SIGTERM)).fit()
    assert result.steps == 12


def test_a_finished_run_has_nothing_to_do(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    first = make_trainer(folder).fit()
    stamp = (folder / "final" / "model.safetensors").stat().st_mtime_ns
    again = make_trainer(folder)
    second = again.fit()
    assert again.loader.asked == []
    assert (first.sha256, first.final_loss) == (second.sha256, second.final_loss)
    assert (first.tokens, first.restarts) == (second.tokens, second.restarts)
    assert (folder / "final" / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(rows(folder)) == 12


def test_killed_between_last_checkpoint_and_final(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    first = make_trainer(folder).fit()
    (folder / "final").rename(folder / "gone")
    second = make_trainer(folder).fit()
    assert first.sha256 == second.sha256


def test_a_longer_run_moves_the_old_final_aside(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    make_trainer(folder).fit()
    result = make_trainer(folder, max_steps=16).fit()
    assert result.steps == 16
    assert read_checkpoint(folder / "final").meta["step"] == 16
    (kept,) = folder.glob("final.bak-*")
    assert read_checkpoint(kept).meta["step"] == 12


def test_resume_passes_over_a_damaged_checkpoint(make_trainer: Trainers, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "a" / "pretrain").fit()
    folder = tmp_path / "b" / "pretrain"
    with pytest.raises(StoppedBySignal):
        make_trainer(folder, objective=StopAt(9, signal.SIGTERM)).fit()
    path = folder / "checkpoints" / "step-00000009" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    resumed = make_trainer(folder)
    result = resumed.fit()
    assert resumed.loader.asked[0] == 8
    assert same_weights(whole.checkpoint, result.checkpoint)
    assert rows(tmp_path / "a" / "pretrain") == rows(folder)
    assert list((folder / "checkpoints").glob("step-00000009.bak-*"))


@pytest.mark.parametrize("fault", ["format", "stale", "rights"])
def test_resume_refuses_what_it_cannot_read_and_leaves_it(
    make_trainer: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """It may be good: going on from an older one, or from nothing, would lose steps."""
    folder = tmp_path / "pretrain"
    make_trainer(folder).fit()
    newest = folder / "checkpoints" / "step-00000012"
    if fault == "format":
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(to_json({**manifest, "format": FORMAT + 1}))
        told = "was written by a newer version: upgrade"
    elif fault == "stale":
        read = Path.read_bytes

        def stale(path: Path) -> bytes:
            if path == newest / "manifest.json":
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", stale)
        told = "step-00000012 cannot be read .*Stale file handle"
    else:

        def denied(path: Path) -> str:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(checkpoint, "sha256_file", denied)
        told = "step-00000012 cannot be read .*Permission denied"
    with pytest.raises(CheckpointError, match=told):
        make_trainer(folder, max_steps=13).fit()
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [
        "step-00000008",
        "step-00000012",
    ]
    assert not list(folder.rglob("*.bak-*"))


def test_a_published_model_that_cannot_be_read_is_not_moved(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    folder = tmp_path / "pretrain"
    make_trainer(folder).fit()
    path = folder / "final" / "manifest.json"
    newer = {**json.loads(path.read_text()), "format": FORMAT + 1}
    path.write_text(to_json(newer))
    with pytest.raises(CheckpointError, match="newer version"):
        make_trainer(folder).fit()
    assert json.loads(path.read_text()) == newer


def test_resume_off_refuses_a_folder_with_checkpoints(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    make_trainer(tmp_path / "pretrain").fit()
    with pytest.raises(CheckpointError, match="resume from them, or choose another output"):
        make_trainer(tmp_path / "pretrain", resume=False).fit()


def test_changed_data_is_refused_unless_allowed(
    make_trainer: Trainers, make_loader: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pretrain"
    with pytest.raises(StoppedBySignal):
        make_trainer(folder, objective=StopAt(5, signal.SIGTERM)).fit()
    other = make_loader(fingerprint="data-2")
    with pytest.raises(DataError, match="the training data or its order changed"):
        make_trainer(folder, loader=other).fit()
    with caplog.at_level(logging.WARNING, logger="modern_llm"):
        result = make_trainer(folder, loader=other, allow_data_change=True).fit()
    assert result.steps == 12
    assert "going on, as asked" in caplog.text
    assert read_checkpoint(result.checkpoint).meta["data_fingerprint"] == "data-2"


def test_a_changed_config_is_told(
    make_trainer: Trainers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pretrain"
    with pytest.raises(StoppedBySignal):
        make_trainer(folder, objective=StopAt(5, signal.SIGTERM)).fit()
    with caplog.at_level(logging.WARNING, logger="modern_llm"):
        make_trainer(folder, lr=1e-4, max_steps=13).fit()
    assert "another config: training.max_steps, training.lr" in caplog.text
    assert rows(folder)[5]["lr"] < 1e-4


def test_checkpoints_of_another_model_are_refused(
    make_trainer: Trainers, make_model: Any, tmp_path: Path
) -> None:
    make_trainer(tmp_path / "pretrain").fit()
    with pytest.raises(CheckpointError, match=r"model.n_layers is 2 there and 1 here"):
        make_trainer(tmp_path / "pretrain", model=make_model(n_layers=1)).fit()


class DivergesAt(LMObjective):
    def __init__(self, step: int, *, factor: float = math.nan) -> None:
        super().__init__()
        self.left, self.factor = 2 * step, factor

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        self.left -= 1
        loss_sum = super().__call__(model, batch).loss_sum
        return Terms(loss_sum * self.factor if self.left == 0 else loss_sum)


def test_divergence_names_step_and_last_good_checkpoint(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    folder = tmp_path / "pretrain"
    with pytest.raises(DivergedError) as told:
        make_trainer(folder, objective=DivergesAt(7)).fit()
    for part in ("step 7", "loss=nan", "lower training.lr", "step-00000004"):
        assert part in str(told.value)
    assert rows(folder, "stop")[0]["status"] == "diverged"
    assert [f.name for f in list_checkpoints(folder / "checkpoints")] == ["step-00000004"]
    with pytest.raises(DivergedError, match="last good checkpoint: none yet"):
        make_trainer(tmp_path / "other", objective=DivergesAt(2)).fit()


def test_weights_gone_bad_between_steps_are_not_published(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    folder = tmp_path / "pretrain"
    trainer = make_trainer(folder, save_every=4)
    update = trainer.update

    def poison(*args: Any, **kwargs: Any) -> Any:
        stats = type(update).__call__(update, *args, **kwargs)
        if kwargs["step"] == 7:
            with torch.no_grad():
                trainer.model.embedding.weight[0, 0] = math.nan
        return stats

    trainer.update = poison  # type: ignore[assignment]
    poison.state_dict, poison.busy_s = update.state_dict, 0.0  # type: ignore[attr-defined]
    with pytest.raises(DivergedError, match=r"step-00000008 is not saved.*step-00000004"):
        trainer.fit()
    assert [f.name for f in list_checkpoints(folder / "checkpoints")] == ["step-00000004"]


def test_best_checkpoint_is_kept_and_hooks_run_on_time(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    folder = tmp_path / "pretrain"
    losses = iter([9.0, 5.0, 1.0, 3.0, 4.0, 2.0])  # at steps 0, 4, 8, 12, 16, 20
    modes, texts = [], []

    def evaluate(model: nn.Module) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        torch.rand(3)  # a hook that draws must not change the run
        return {"loss": next(losses), "accuracy": 0.5}

    def sample(model: nn.Module) -> dict[str, Any]:
        texts.append(model.training)
        return {"text": "abc"}

    trainer = make_trainer(
        folder, max_steps=20, eval_every=4, sample_every=10, evaluate=evaluate, sample=sample
    )
    result = trainer.fit()
    assert modes == [(False, False)] * 6
    assert trainer.model.training
    assert [(row["step"], row["loss"]) for row in rows(folder, "eval")] == list(
        zip(range(0, 21, 4), [9.0, 5.0, 1.0, 3.0, 4.0, 2.0], strict=True)
    )
    assert [row["step"] for row in rows(folder, "sample")] == [10, 20]
    assert texts == [False, False]
    assert result.best == {"step": 8, "loss": 1.0}
    kept = [f.name for f in list_checkpoints(folder / "checkpoints")]
    assert kept == ["step-00000008", "step-00000016", "step-00000020"]
    assert read_checkpoint(folder / "final").meta["validation"] == {"loss": 2.0, "accuracy": 0.5}

    plain = make_trainer(tmp_path / "plain", max_steps=20).fit()
    assert same_weights(plain.checkpoint, result.checkpoint)


def test_the_load_of_every_expert_is_logged(
    make_trainer: Trainers, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(moe={"n_experts": 4, "top_k": 2})
    make_trainer(tmp_path, model=model, max_steps=2).fit()
    logged = rows(tmp_path)
    assert len(logged) == 2
    for row in logged:
        for layer in (0, 1):
            load = row[f"expert_load.layer.{layer}"]
            assert len(load) == 4
            assert sum(load) == pytest.approx(1.0)
            assert all(0 <= share <= 0.5 for share in load)
        assert row["balance_loss"] > 0


def test_no_evaluation_between_start_and_end(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    make_trainer(folder, evaluate=lambda model: {"loss": 1.0}, eval_every=0).fit()
    assert [row["step"] for row in rows(folder, "eval")] == [0, 12]


def test_the_resumed_checkpoint_is_not_pruned(make_trainer: Trainers, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    with pytest.raises(StoppedBySignal):
        make_trainer(folder, objective=StopAt(3, signal.SIGTERM)).fit()
    make_trainer(folder, save_every=1, keep_last=1).fit()
    kept = [f.name for f in list_checkpoints(folder / "checkpoints")]
    assert kept == ["step-00000003", "step-00000012"]


def test_a_model_in_eval_mode_trains_without_dropout(
    make_trainer: Trainers, make_model: Any, tmp_path: Path
) -> None:
    still = make_trainer(tmp_path / "a", model=make_model(dropout=0.5).eval()).fit()
    none = make_trainer(tmp_path / "b", model=make_model(dropout=0.0)).fit()
    assert same_weights(still.checkpoint, none.checkpoint)


def test_the_first_loss_is_checked_once(make_trainer: Trainers, tmp_path: Path) -> None:
    wrong = FirstLoss(math.log(2), 1e-4, "ln 2", refuse=True)
    with pytest.raises(DivergedError, match="the start is broken") as told:
        make_trainer(tmp_path / "dpo", first_loss=wrong).fit()
    assert "training.lr" not in str(told.value)  # no rate was used yet
    folder = tmp_path / "other"
    right = FirstLoss(math.log(32), 0.5, "ln V", refuse=True)
    with pytest.raises(StoppedBySignal):
        make_trainer(folder, first_loss=right, objective=StopAt(5, signal.SIGTERM)).fit()
    make_trainer(folder, first_loss=wrong).fit()  # resumed: step 6 is not the first


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    make_trainer: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pretrain"
    save, calls = torch.save, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ProtectedPathError, match="step-00000008: it needs about"):
        make_trainer(folder).fit()
    assert os.listdir(folder / "checkpoints") == ["step-00000004"]
    verify_checkpoint(folder / "checkpoints" / "step-00000004")
    monkeypatch.setattr(torch, "save", save)
    assert make_trainer(folder).fit().steps == 12


def test_activation_checkpointing_is_applied_or_refused(
    make_trainer: Trainers, make_model: Any, tmp_path: Path
) -> None:
    options = {"model": make_model(dropout=0.1), "activation_checkpointing": True}
    trainer = make_trainer(tmp_path / "a", **options)
    assert trainer.model.activation_checkpointing
    again = trainer.fit()
    plain = make_trainer(tmp_path / "b").fit()
    assert again.final_loss == pytest.approx(plain.final_loss, rel=1e-5)
    with pytest.raises(ConfigError, match="activation_checkpointing: Linear has none"):
        make_trainer(tmp_path / "c", model=nn.Linear(2, 2), activation_checkpointing=True)


def test_devices_and_precisions_that_are_not_there(make_trainer: Trainers, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        make_trainer(tmp_path, precision="fp16")
    automatic = make_trainer(tmp_path, precision="auto")
    assert automatic.config.precision == automatic.update.config.precision
    assert automatic.config.precision in ("fp32", "bf16")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not available here"):
            make_trainer(tmp_path, device="cuda")


def test_compiled_training_gives_the_same_run(
    make_trainer: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, traced = torch.compile, []

    def eager_backend(model: Any, graph_inputs: Any) -> Any:
        traced.append(1)
        return model

    def compile_fast(target: Any, **_: Any) -> Any:
        return compiled(target, backend=eager_backend)

    monkeypatch.setattr(torch, "compile", compile_fast)
    objective = LMObjective(compile=True)
    trainer = make_trainer(tmp_path / "a", compile=True, objective=objective, evaluate=_loss_of)
    result = trainer.fit()
    plain = make_trainer(tmp_path / "b").fit()
    assert traced
    assert same_weights(result.checkpoint, plain.checkpoint)
    assert not any("_orig_mod" in name for name in model_weights(trainer.model))


def _loss_of(model: nn.Module) -> dict[str, float]:
    return {"loss": float(model(torch.zeros(1, 3, dtype=torch.long)).float().std())}
