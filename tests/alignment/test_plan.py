"""Plans for machines by name: parts, engines, refusals with ways out, and published runs."""

import re
from typing import Any

import pytest
import torch

from modern_llm.alignment.plan import Fit, Machine, machine_of
from modern_llm.cli import main
from modern_llm.config import ModelConfig, PipelineConfig, TrainingConfig, load_config
from modern_llm.errors import ConfigError
from modern_llm.models import ModernDecoderLM
from modern_llm.models.memory import Pass, activations
from modern_llm.training.gpus import gpu_named
from modern_llm.training.memory import Share, State

Captured = pytest.CaptureFixture[str]
GIB = 2**30
LLAMA_8B = ModelConfig(
    vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336,
    max_seq_len=32768, tie_embeddings=False,
)  # fmt: skip
TINYLLAMA = ModelConfig(
    vocab_size=32000, d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, d_ff=5632,
    max_seq_len=2048, tie_embeddings=False,
)  # fmt: skip
LARGE = ("model.d_model=4096", "model.n_layers=32", "model.n_heads=32", "model.n_kv_heads=8")
ONE_EACH = [f"{stage}.training.micro_batch_size=1" for stage in ("sft", "dpo", "verifier")]


def machine(name: str, gpus: int, per_node: int = 8) -> Machine:
    found = machine_of(name, gpus, per_node, None)
    assert found is not None
    return found


def fit(name: str, gpus: int, *overrides: str, stages: tuple[str, ...] = ("pretrain",)) -> Fit:
    return Fit(load_config("tacc", list(overrides)), list(stages), machine(name, gpus))


@pytest.fixture
def plan(capsys: Captured, offline: None) -> Any:
    def call(*flags: str) -> tuple[int, str]:
        code = main(["plan", "--config", "tacc", *flags])
        told = capsys.readouterr()
        return code, " ".join((told.out + told.err).split())

    return call


# --- the command


def test_the_flagship_on_a_node(plan: Any) -> None:
    """All parts of all engines, hours, what to add, disk; this machine has no GPU and no data."""
    code, told = plan("--gpus", "8", "--gpu", "h100")
    assert code == 0, told
    for word in (
        "params", "grads", "optim", "activ", "loss", "buffers", "total", "GPU-hours",
        "ddp", "zero1", "fsdp grad_op", "fsdp full", "8 x h100 (1 node of 8)", "hours at 40%",
        "recommended: ddp", "training.distributed=ddp", "of weights", "host memory of rank 0",
        "ready: nothing stands in the way",
    ):  # fmt: skip
        assert word in told, word
    assert "hybrid" not in told  # one node
    assert "not available here" not in told and "MODERN_LLM_DATA" not in told


def test_several_nodes_have_the_hybrid_engine(plan: Any) -> None:
    code, told = plan("--gpus", "8", "--gpus-per-node", "4", "--gpu", "A100-80GB")
    assert code == 0, told
    assert "8 x a100-80gb (2 nodes of 4)" in told and "fsdp hybrid" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "mi300x"), "--gpu mi300x: unknown; the table has b200"),
        (("--gpu", "a100"), "which of a100-80gb, a100-40gb?"),
        (("--gpus", "8"), "--gpus: of which card? give --gpu NAME"),
        (("--gpu", "h100", "--gpus", "0"), "--gpus=0: at least 1"),
        (("--gpu", "h100", "--gpus", "12"), "--gpus=12 does not fill nodes of 8: use 8 or 16"),
        (("--gpu", "h100", "--mfu", "40"), "--mfu=40.0: a share of the peak"),
    ],
)
def test_a_machine_that_cannot_be(plan: Any, flags: tuple[str, ...], message: str) -> None:
    code, told = plan(*flags)
    assert code == 2
    assert message in told


def test_what_does_not_fit_is_refused_with_what_would(plan: Any) -> None:
    code, told = plan("--gpus", "2", "--gpu", "rtx4090", "--stage", "pretrain")
    assert code == 2
    assert "pretrain: ddp with micro_batch_size=32 takes" in told
    assert (
        "GB of the 21.6 GB that can be used on rtx4090; this would fit: micro_batch_size=8" in told
    )


def test_a_batch_that_does_not_divide_is_told_with_sizes_that_do(plan: Any) -> None:
    code, told = plan("--gpus", "24", "--gpu", "h100", "--stage", "pretrain")
    assert code == 2
    assert "batch_size=512 is no multiple of micro_batch_size=32 x 24 GPUs" in told
    assert "use batch_size 768, or 16 GPUs" in told
    code, told = plan("--gpus", "8", "--gpu", "h100", "sft.training.micro_batch_size=32")
    assert code == 2
    assert "sft.training: batch_size=64 is no multiple of micro_batch_size=32 x 8 GPUs" in told
    assert "use micro_batch_size 1, 2, 4, 8, or batch_size 256, or 2 GPUs" in told


def test_hours_follow_the_assumption(plan: Any) -> None:
    def hours(*flags: str) -> float:
        _, told = plan("--stage", "pretrain", "training.distributed=ddp", *flags)
        row = re.search(r"pretrain 1,145 .*?e\+18 ([\d.]+) ([\d.]+)", told)
        assert row is not None, told
        return float(row[2])  # GPU-hours

    assert hours("--gpu", "h100", "--gpus", "8") == pytest.approx(0.73, abs=0.01)
    assert hours("--gpu", "h100", "--gpus", "8", "--mfu", "0.2") == pytest.approx(1.46, abs=0.01)


def test_a_plan_for_this_machine_has_no_table_of_engines(plan: Any) -> None:
    code, told = plan()
    assert code == 2 and "'cuda' is not available here" in told
    assert "zero1" not in told and "--gpu NAME tells all parts" in told


# --- what fits


def test_the_simplest_engine_that_fits_is_recommended() -> None:
    small = fit("h100", 8).choice
    assert small is not None and str(small.share) == "ddp" and not small.checkpointing
    large = fit("h100", 16, *LARGE).choice
    assert large is not None and large.share.engine == "fsdp"
    alone = fit("h100", 1).choice
    assert alone is not None and str(alone.share) == "none"


def test_what_is_recommended_can_be_given_back() -> None:
    """With the overrides that are printed, nothing stands in the way."""
    for name, gpus in (("rtx4090", 2), ("a100-40gb", 16), ("h100", 64), ("t4", 4)):
        stages = ("pretrain", "sft", "dpo", "verifier")
        overrides = ["training.precision=auto"]
        first = fit(name, gpus, *overrides, stages=stages)
        assert first.choice is not None
        added = first.choice.overrides(first.config, list(stages))
        again = fit(name, gpus, *overrides, *added, stages=stages)
        assert again.problems == [], (name, added)
        assert again.choice == first.choice
        assert again.choice.overrides(again.config, list(stages)) == []


def test_every_way_out_is_one() -> None:
    """Each change that a refusal names makes the stage fit."""
    base = ("training.distributed=fsdp", *LARGE)
    (problem,) = fit("h100", 16, *base).problems
    told = str(problem)
    ways = told.partition("this would fit: ")[2].split("; ")
    assert len(ways) == 3
    for way in ways:
        gpus = int(re.match(r"(\d+) GPUs", way)[1]) if "GPUs" in way else 16
        changes = re.findall(r"(micro_batch_size=\d+|activation_checkpointing=true)", way)
        tried = fit("h100", gpus, *base, *(f"training.{change}" for change in changes))
        assert tried.problems == [], way


def test_checkpointing_is_turned_on_only_where_it_must() -> None:
    one = ("training.batch_size=8", "training.micro_batch_size=1", "model.n_layers=64")
    short = fit("rtx4090", 8, *one).choice
    assert short is not None and not short.checkpointing
    longer = ("model.max_seq_len=8192", "model.vocab_size=1000")
    choice = fit("rtx4090", 8, *one, *longer).choice
    assert choice is not None and choice.checkpointing
    assert "pretrain.training.activation_checkpointing=true" in choice.overrides(
        load_config("tacc", [*one, *longer]), ["pretrain"]
    )


def test_where_this_design_stops() -> None:
    found = fit("t4", 2, "training.precision=fp16", "model.d_model=8192", "model.n_layers=80")
    assert found.choice is None
    assert all(share.engine != "fsdp" for share in found.shares())  # not in fp16
    assert "this would fit: nothing of this package (docs/scaling.md)" in str(found.problems[0])


def test_no_engine_is_open_and_a_given_one_is_not() -> None:
    open_choice = fit("h100", 8)
    assert str(open_choice.planned(open_choice.stages[0])) == "ddp"
    given = fit("h100", 8, "training.distributed=zero1")
    assert str(given.planned(given.stages[0])) == "zero1"
    sharded = fit("h100", 16, "training.distributed=fsdp", "training.distributed.sharding=hybrid")
    assert str(sharded.planned(sharded.stages[0])) == "fsdp hybrid"


def test_precision_auto_is_that_of_the_card() -> None:
    stages = [fit(n, 1, "training.precision=auto").stages[0] for n in ("h100", "t4")]
    assert [(s.precision, s.number) for s in stages] == [("bf16", 2), ("fp16", 2)]
    full = fit("h100", 1, "training.precision=fp32").stages[0]
    assert full.number == 4 and full.hours(1e18) is None  # no figure for it


def test_the_engines_are_those_of_the_trainer() -> None:
    from modern_llm.alignment.plan.fit import SHARES
    from modern_llm.training.engines import ENGINES

    assert {engine for engine, _ in SHARES} == set(ENGINES) - {"none"}


def test_machines() -> None:
    two = machine("h100", 16)
    assert (two.nodes, two.usable_bytes) == (2, pytest.approx(72e9))
    assert machine("h100", 4).per_node == 4
    assert machine_of(None, None, None, None) is None
    with pytest.raises(ConfigError, match="--gpus=0: at least 1\n--mfu=2"):
        machine_of("h100", 0, None, 2.0)


# --- published runs


def flops(config: ModelConfig, seq_len: int) -> float:
    with torch.device("meta"):
        return ModernDecoderLM(config).cost(seq_len).flops_per_token_training


def implied_mfu(config: ModelConfig, seq_len: int, tokens_per_s: float, gpu: str) -> float:
    """Of a GPU that trains so many tokens a second."""
    peak = gpu_named(gpu)[1].peak_flops("bf16")
    assert peak is not None
    return tokens_per_s * flops(config, seq_len) / peak


@pytest.mark.parametrize(
    ("config", "seq_len", "tokens_per_s", "gpu", "published"),
    [  # tokens/s of a GPU, and the MFU that is published with them; sources in docs/scaling.md
        (LLAMA_8B, 8192, 5_762, "h100", 0.33),
        (LLAMA_8B, 8192, 6_667, "h100", 0.39),
        (LLAMA_8B, 8192, 2_904, "a100-80gb", 0.568),
        (TINYLLAMA, 2048, 24_000, "a100-40gb", 0.56),
    ],
)
def test_mfu_of_published_speeds(
    config: ModelConfig, seq_len: int, tokens_per_s: float, gpu: str, published: float
) -> None:
    assert implied_mfu(config, seq_len, tokens_per_s, gpu) == pytest.approx(published, rel=0.06)


def gib(gpus: int, rows: int, seq_len: int, *, checkpointing: bool) -> float:
    state = State(LLAMA_8B, TrainingConfig(max_steps=1, seq_len=seq_len))
    step = activations(LLAMA_8B, Pass(rows, seq_len, 2))
    share = Share("fsdp", "full", gpus)
    return state.footprint(share, step, number=2, checkpointing=checkpointing).total / GIB


def test_memory_of_published_runs() -> None:
    """Llama 3.1 8B by torchtitan, FSDP on H100: sources in docs/scaling.md."""
    assert gib(8, 1, 32_768, checkpointing=True) == pytest.approx(83.9, rel=0.1)
    # Two rows, half of the blocks' operators computed again: between all and none.
    for gpus, published in ((8, 82.4), (128, 67.0)):
        again, kept = (gib(gpus, 2, 8192, checkpointing=c) for c in (True, False))
        assert again < published < kept
    from_8_to_128 = gib(8, 2, 8192, checkpointing=True) - gib(128, 2, 8192, checkpointing=True)
    assert from_8_to_128 == pytest.approx(82.4 - 67.0, rel=0.1)


def test_tinyllama_fits_as_published() -> None:
    """16 k tokens a GPU of 40 GB, without computing activations again (arXiv:2401.02385)."""
    state = State(TINYLLAMA, TrainingConfig(max_steps=1, seq_len=2048))
    step = activations(TINYLLAMA, Pass(8, 2048, 2))
    parts = state.footprint(Share("fsdp", "full", 16), step, number=2, checkpointing=False)
    assert 0.8 * 40e9 < parts.total < 40e9


def test_eight_billion_on_512() -> None:
    config: PipelineConfig = load_config(
        "tacc",
        [
            *LARGE, "model.d_ff=14336", "model.vocab_size=128256", "model.tie_embeddings=false",
            "model.max_seq_len=8192", "training.micro_batch_size=1", *ONE_EACH,
            "training.distributed=fsdp",
        ],
    )  # fmt: skip
    found = Fit(config, ["pretrain"], machine("h100", 512))
    assert found.problems == []
    (stage,) = found.stages
    assert stage.state.parameters == 8_030_261_248
    hours = stage.hours(15e12 * flops(LLAMA_8B, 8192))
    assert hours == pytest.approx(15e12 * 57.9e9 / (512 * 0.4 * 989e12) / 3600, rel=0.01)
