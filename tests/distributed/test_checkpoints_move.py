"""Interrupted is uninterrupted, to the bit; and a checkpoint goes to any engine and world size."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Launcher, rows
from safetensors.torch import load_file

from modern_llm.runtime.artifacts import sha256_file
from modern_llm.training.checkpoint import read_checkpoint, write_checkpoint

STEPS = 8
ENGINES = {"1": (0, "none"), "2-ddp": (2, "ddp"), "2-zero1": (2, "zero1"), "3-fsdp": (3, "fsdp")}
SIZES = {
    "model.vocab_size": 301,
    "training.batch_size": 12,
    "training.micro_batch_size": 2,
    "training.eval_every": 3,
    "training.keep_last": 9,
    "pretrain.training": {"max_steps": STEPS},
    "pretrain.data": [{"name": "synthetic", "kind": "text", "rows": 40, "held_out_rows": 4}],
}
DROPOUT = ["model.dropout=0.2"]
MUON = ["training.optimizer=muon"]


def case(folder: Path, engine: str, *overrides: str, **options: Any) -> dict[str, Any]:
    chosen = [f"training.distributed={engine}", *overrides]
    return {"stage": "pretrain", "run": str(folder), "overrides": chosen, **options}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    return write_tiny(tmp_path_factory.mktemp("move"), SIZES)


@pytest.fixture(scope="module")
def stopped(config: Path, rank_server: Any) -> Path:
    """Of each engine: a whole run, one that was stopped thrice, and runs that stopped half-way."""
    for name, (world_size, engine) in ENGINES.items():
        folder = config.parent / name
        cases = [
            case(folder / "dropout", engine, *DROPOUT),
            # Inside an epoch, at a save, and one step before the end of the next epoch.
            case(folder / "dropout-stopped", engine, *DROPOUT, stops=[1, 4, 7]),
            case(folder / "muon", engine, *MUON),
            case(folder / "muon-stopped", engine, *MUON, stops=[4]),
            case(folder / "adamw", engine),
            case(folder / "adamw-half", engine, stops=[4], ends=False),
            case(folder / "muon-half", engine, *MUON, stops=[4], ends=False),
            case(folder / "dropout-half", engine, *DROPOUT, stops=[4], ends=False),
        ]
        Launcher(rank_server)(world_size, "train", config=str(config), cases=cases)
    return config.parent


def state(run: Path, step: int = STEPS) -> dict[str, Any]:
    return read_checkpoint(run / "pretrain/checkpoints" / f"step-{step:08d}").trainer_state()


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value
    return [t for v in children for t in tensors(v)] if isinstance(value, dict | list) else []


@pytest.mark.parametrize("run", ["dropout", "muon"])
@pytest.mark.parametrize("name", ENGINES)
def test_stopped_and_gone_on_is_undisturbed_to_the_bit(stopped: Path, name: str, run: str) -> None:
    whole, again = stopped / name / run, stopped / name / f"{run}-stopped"
    files = [at / "pretrain/final/model.safetensors" for at in (whole, again)]
    assert sha256_file(files[0]) == sha256_file(files[1])
    assert rows(whole / "pretrain") == rows(again / "pretrain")
    mine, theirs = state(whole), state(again)
    for key in ("update", "rng"):
        pairs = list(zip(tensors(mine[key]), tensors(theirs[key]), strict=True))
        assert pairs
        assert all(torch.equal(one, other) for one, other in pairs), key
    assert [own["python"] for own in mine["rng"]] == [own["python"] for own in theirs["rng"]]
    assert theirs["progress"]["restarts"] == {"dropout": 3, "muon": 1}[run]


def test_every_rank_has_its_own_dropout(stopped: Path) -> None:
    for name, (world_size, _) in ENGINES.items():
        states = [s["torch"] for s in state(stopped / name / "dropout")["rng"]]
        assert len(states) == max(1, world_size)
        assert len({bytes(s.tolist()) for s in states}) == len(states), name


@pytest.mark.parametrize("name", ENGINES)
def test_a_checkpoint_of_any_engine_goes_on_in_any_other(
    ranks: Launcher, config: Path, stopped: Path, name: str
) -> None:
    """Five steps on, losses and weights are those of the run that was never stopped or moved."""
    world_size, engine = ENGINES[name]
    moves, cases = [], []
    for other in ENGINES:
        for optimizer, overrides in (("adamw", []), ("muon", MUON)):
            folder = stopped / f"{other}-to-{name}" / optimizer
            shutil.copytree(stopped / other / f"{optimizer}-half", folder)
            moves.append((stopped / other / optimizer, folder, optimizer))
            cases.append(case(folder, engine, *overrides))
    ranks(world_size, "train", config=str(config), cases=cases)
    for whole, moved, optimizer in moves:
        starts = rows(moved / "pretrain", "start")
        assert [row["step"] for row in starts] == [0, 4]
        assert starts[1]["resumed_from"] == "step-00000004"
        for mine, theirs in zip(rows(whole / "pretrain"), rows(moved / "pretrain"), strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5), (moved, mine["step"])
        # Muon's iterations are in bf16, which rounds a gradient that differs in its last bit.
        far = 1e-5 if optimizer == "adamw" else 5e-3
        files = [at / "pretrain/final/model.safetensors" for at in (whole, moved)]
        mine, theirs = map(load_file, files)
        for key, tensor in mine.items():
            assert float((theirs[key] - tensor).norm() / tensor.norm()) < far, (moved, key)
        moments = [tensors(state(at)["update"]["optimizer"]) for at in (whole, moved)]
        for one, other in zip(*moments, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=far, atol=float(one.abs().max()) * far)


@pytest.mark.parametrize("name", ["1", "2-ddp"])
def test_a_checkpoint_from_before_there_were_ranks_goes_on(
    ranks: Launcher, config: Path, stopped: Path, name: str
) -> None:
    """It has the random state of one process, and not a list of them."""
    world_size, engine = ENGINES[name]
    folder = stopped / f"early-to-{name}"
    shutil.copytree(stopped / "1" / "dropout-half", folder)
    newest = folder / "pretrain/checkpoints/step-00000004"
    early = read_checkpoint(newest)
    state_of_it = early.trainer_state()
    (state_of_it["rng"],) = state_of_it["rng"]
    tokenizer_json = early.tokenizer_path.read_text()
    weights = {key: tensor.clone() for key, tensor in early.weights.items()}
    shutil.rmtree(newest)
    write_checkpoint(
        newest, weights=weights, meta=early.meta, tokenizer_json=tokenizer_json,
        trainer_state=state_of_it,
    )  # fmt: skip
    given = [case(folder, engine, *DROPOUT)]
    ranks(world_size, "train", config=str(config), cases=given)
    starts = rows(folder / "pretrain", "start")
    assert [row["resumed_from"] for row in starts] == [None, "step-00000004"]
    if name == "1":
        whole = stopped / "1" / "dropout"
        files = [at / "pretrain/final/model.safetensors" for at in (whole, folder)]
        assert sha256_file(files[0]) == sha256_file(files[1])
        assert rows(whole / "pretrain") == rows(folder / "pretrain")


def assert_same_bits(one: Path, other: Path) -> None:
    name = f"pretrain/checkpoints/step-{STEPS:08d}"
    last = [read_checkpoint(run / name) for run in (one, other)]
    for name, tensor in last[0].weights.items():
        assert torch.equal(tensor, last[1].weights[name]), name
    for mine, theirs in zip(*(tensors(at.trainer_state()) for at in last), strict=True):
        assert torch.equal(mine, theirs)


def test_three_ranks_go_on_to_the_bit(config: Path, ranks: Launcher) -> None:
    """From three on, the order of a sum depends on where in a message a gradient lies."""
    folder = config.parent / "three"
    cases = [
        case(folder / f"{engine}{name}", engine, **options)
        for engine in ("ddp", "zero1", "fsdp")
        for name, options in (("", {}), ("-stopped", {"stops": [1, 4]}))
    ]
    ranks(3, "train", config=str(config), cases=cases)
    for engine in ("ddp", "zero1", "fsdp"):
        assert_same_bits(folder / engine, folder / f"{engine}-stopped")


def test_a_start_that_begins_with_a_sample_goes_on(config: Path, ranks: Launcher) -> None:
    """The stop at step 4 leaves the sample of that step, which the next start draws first."""
    folder = config.parent / "sampled"
    often = ["training.sample_every=4", "training.eval_every=0"]
    cases = [
        case(folder / "whole", "fsdp", *often),
        case(folder / "cut", "fsdp", *often, stops=[4]),
    ]
    ranks(2, "train", config=str(config), cases=cases)
    assert_same_bits(folder / "whole", folder / "cut")
