"""Equal terms against models that are really built, and FLOPs that torch counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modern_llm.config import ModelConfig, PipelineConfig, StudyConfig, as_overrides, load_config
from modern_llm.errors import ConfigError
from modern_llm.experiments.matching import cost_of, flops_ratio, steps_at, with_params_of
from modern_llm.experiments.study import Study
from modern_llm.models import ModernDecoderLM

GPT2 = {
    "vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
    "position": "learned", "norm": "layernorm", "ffn": "standard", "activation": "gelu_tanh",
    "bias": True,
}  # fmt: skip
LLAMA = {
    "position": "rope", "norm": "rmsnorm", "ffn": "swiglu", "activation": "gelu", "bias": False,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "swiglu": {"ffn": "swiglu", "activation": "gelu"},
    "moe": {"moe": {"n_experts": 4, "top_k": 2}},
    "moe-nine": {"moe": {"n_experts": 9, "top_k": 1}},  # a multiple of 8 is 6 % off
    "moe-every-second": {"moe": {"n_experts": 3, "top_k": 1, "every": 2}},
    "relu2": {"ffn": "relu2", "activation": "gelu"},
    "untied": {"tie_embeddings": False},
    "grouped": {"n_kv_heads": 1},
    "deeper": {"n_layers": 3},
}
Make = Callable[..., StudyConfig]


def built_params(config: ModelConfig) -> int:
    """Trained numbers of a model that is built, shared ones once."""
    return sum(parameter.numel() for parameter in ModernDecoderLM(config).parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_parameters_agree_within_one_percent(arm: str) -> None:
    default = (
        {}
        if "ffn" not in ARMS[arm]
        else {"activation": ModelConfig.model_fields["activation"].default}
    )
    reference = ModelConfig(**GPT2)
    model = ModelConfig(**{**GPT2, **ARMS[arm], **default})

    matched = with_params_of(model, reference)

    wanted = built_params(reference)
    assert abs(built_params(matched) - wanted) <= 0.01 * wanted
    assert cost_of(matched, 1).params == built_params(matched)
    assert matched.model_copy(update={"d_ff": model.d_ff}) == model, "only the width changes"
    before = abs(built_params(model) - wanted)
    assert before > 0.001 * wanted or matched == model, "what is equal is left alone"


def test_the_width_is_a_multiple_of_eight_where_that_is_close_enough() -> None:
    reference = ModelConfig(**{**GPT2, "d_model": 128, "n_layers": 4})
    model = ModelConfig(**{**GPT2, "d_model": 128, "n_layers": 4, "tie_embeddings": False})

    assert with_params_of(model, reference).d_ff % 8 == 0


def test_parameters_that_cannot_be_had_are_refused() -> None:
    reference = ModelConfig(**GPT2)
    too_large = ModelConfig(**{**GPT2, "d_model": 256})

    with pytest.raises(ConfigError) as error:
        with_params_of(too_large, reference)

    told = str(error.value)
    assert "hold=params" in told and f"{built_params(reference):,}" in told
    without = built_params(too_large) - 2 * too_large.d_ff * (2 * 256 + 1)  # bias a unit
    assert f"without its feed-forward it has {without:,}" in told


def small_config(small: dict[str, Any], **changes: Any) -> PipelineConfig:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("gpt2", as_overrides({**small, **dotted}))


def counted_step_flops(config: PipelineConfig) -> int:
    """FLOPs of one training step as torch counts them, by the kernel that it can count."""
    training = config.pretrain.training
    model: nn.Module = ModernDecoderLM(config.model)
    tokens_BT = torch.randint(0, 200, (training.batch_size, training.seq_len))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens_BT).float().sum().backward()
    return counter.get_total_flops()


FLOPS_ARMS: list[dict[str, Any]] = [
    {"model__n_layers": 2},
    {"model__d_model": 32},
    {"model__ffn": "swiglu", "model__position": "rope"},
    {"model__tie_embeddings": False, "model__n_kv_heads": 1},
    {"pretrain__training__batch_size": 8, "pretrain__training__micro_batch_size": 8},
    {"pretrain__training__seq_len": 16},
]


@pytest.mark.parametrize("changes", FLOPS_ARMS, ids=str)
def test_training_flops_agree_within_half_a_step(
    changes: dict[str, Any], small: dict[str, Any]
) -> None:
    steps = {"pretrain__training__max_steps": 400, "model__attention_backend": "sdpa"}
    reference = small_config(small, **steps)
    config = small_config(small, **{**steps, **changes})

    own_steps = steps_at(config, reference, ratio=flops_ratio(config, reference))

    step = counted_step_flops(config)
    assert abs(own_steps * step - 400 * counted_step_flops(reference)) <= 0.5 * step
    assert own_steps != 400


def test_tokens_agree_for_other_batches_and_lengths(small: dict[str, Any]) -> None:
    reference = small_config(small, pretrain__training__max_steps=60)
    other = small_config(
        small, pretrain__training__batch_size=6, pretrain__training__micro_batch_size=6,
        pretrain__training__seq_len=16,
    )  # fmt: skip

    steps = steps_at(other, reference, ratio=1.0)

    assert steps * 6 * 16 == 60 * 4 * 32
    assert steps_at(other, reference, ratio=1e-9) == 1, "never none"


def steps_of(study: Study) -> dict[str, int]:
    return {
        name: experiment.cells[0].config.pretrain.training.max_steps
        for name, experiment in study.experiments.items()
    }


def test_a_study_holds_what_it_is_asked_to(make_study: Make, tmp_path: Any) -> None:
    arms: dict[str, Any] = {
        "plain": {},
        "half": {"pretrain.training.batch_size": 2, "pretrain.training.micro_batch_size": 2},
        "swiglu": {"model.ffn": "swiglu", "model.d_ff": 128},
    }

    tokens = steps_of(Study(make_study(arms), output=tmp_path))
    assert tokens == {"plain": 6, "half": 12, "swiglu": 6}
    flops = steps_of(Study(make_study(arms, hold="flops"), output=tmp_path))
    assert flops["plain"] == 6 and flops["half"] == 12 and flops["swiglu"] < 6
    study = Study(make_study(arms, hold="params"), output=tmp_path)
    models = {name: e.cells[0].config.model for name, e in study.experiments.items()}
    plain, swiglu = (built_params(models[name]) for name in ("plain", "swiglu"))
    assert abs(swiglu - plain) <= 0.01 * plain


def test_speed_is_that_of_the_arm_that_is_trained(
    make_study: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``hold=params`` that is the arm of the width that was found, not the one asked for."""
    seen = {}

    def run(cells: Any, **_: Any) -> dict[str, str]:
        seen.update({cell.label: cell.config.model.d_ff for cell in cells})
        return {cell.name: "not run here" for cell in cells}

    monkeypatch.setattr("modern_llm.experiments.study.run_cells", run)
    arms: dict[str, Any] = {"plain": {}, "experts": {"model.moe": {"n_experts": 4, "top_k": 2}}}
    study = Study(make_study(arms, hold="params", speed_rounds=1), output=tmp_path)

    assert study.speeds == {}
    trained = {name: e.cells[0].config.model.d_ff for name, e in study.experiments.items()}
    assert seen == {f"speed-{name}-seed0": width for name, width in trained.items()}
    assert trained["experts"] < trained["plain"]


def test_any_two_arms_of_equal_parameters_are_within_one_percent(
    make_study: Make, tmp_path: Any
) -> None:
    arms: dict[str, Any] = {
        "plain": {},
        "swiglu": {"model.ffn": "swiglu"},
        "untied": {"model.tie_embeddings": False, "model.ffn": "geglu"},
        "experts": {"model.moe": {"n_experts": 2}},
    }
    overrides = {"model.d_model": 64, "model.n_layers": 2, "model.d_ff": 384}
    study = Study(make_study(arms, overrides=overrides, hold="params"), output=tmp_path)
    counts = [built_params(e.cells[0].config.model) for e in study.experiments.values()]
    assert max(counts) - min(counts) <= 0.01 * max(counts)


def test_seconds_are_held_by_speed(
    make_study: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm of half the speed sees half the tokens; rounds take turns, their median counts."""
    speeds = {"plain": iter([100.0, 900.0, 110.0]), "slow": iter([1.0, 55.0, 70.0])}
    turns: list[str] = []

    def speed(self: Study, name: str, turn: int) -> dict[str, float]:
        turns.append(name)
        return {"tokens_per_s": next(speeds[name])}

    monkeypatch.setattr(Study, "_speed", speed)
    config = make_study(
        {"plain": {}, "slow": {"model.n_layers": 2}}, hold="seconds", speed_rounds=3,
        overrides={"pretrain.training.max_steps": 100},
    )  # fmt: skip

    assert steps_of(Study(config, output=tmp_path)) == {"plain": 100, "slow": 50}
    assert turns == ["plain", "slow"] * 3


def test_a_cap_on_all_stages_does_not_cut_equal_terms(make_study: Make, tmp_path: Any) -> None:
    arms: dict[str, Any] = {
        "plain": {},
        "half": {"pretrain.training.batch_size": 2, "pretrain.training.micro_batch_size": 2},
    }
    config = make_study(arms, overrides={"max_steps": 4})

    assert steps_of(Study(config, output=tmp_path)) == {"plain": 4, "half": 8}


def test_a_grid_cell_without_a_fitting_width_is_left_out(make_study: Make, tmp_path: Any) -> None:
    study = Study(
        make_study({}, grid={"model.d_model": [16, 64], "model.n_heads": [2, 4]}, hold="params"),
        output=tmp_path,
    )

    assert list(study.experiments) == ["d_model16-n_heads2", "d_model16-n_heads4"]
    assert [line.split(": ")[0] for line in study.left_out] == [
        "d_model64-n_heads2", "d_model64-n_heads4",
    ]  # fmt: skip
    assert all("hold=params" in line for line in study.left_out)


def test_an_arm_without_a_fitting_width_is_refused(make_study: Make, tmp_path: Any) -> None:
    study = Study(
        make_study({"plain": {}, "wide": {"model.d_model": 64}}, hold="params"), output=tmp_path
    )

    with pytest.raises(ConfigError, match="hold=params"):
        study.run()
