"""Configs of experiments, and what two runs of one seed have in common."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment.stages.pretrain import PretrainStage
from modern_llm.config import PipelineConfig, as_overrides
from modern_llm.errors import ConfigError
from modern_llm.experiments import ArchitectureExperiment, ExperimentConfig


def test_fields_of_other_projects() -> None:
    config = ExperimentConfig(
        "wide", num_heads=8, num_layers=2, hidden_size=320, position="rope", learning_rate=1e-4,
        max_steps=7, batch_size=8, seeds=[3, 4], threads=2, output="elsewhere",
    )  # fmt: skip

    pipeline = config.pipeline(4)
    assert (pipeline.model.n_heads, pipeline.model.n_layers, pipeline.model.d_model) == (8, 2, 320)
    assert pipeline.model.position.name == "rope"
    training = pipeline.pretrain.training
    assert (training.lr, training.max_steps, training.batch_size) == (1e-4, 7, 8)
    assert (training.seed, training.threads, pipeline.seed) == (4, 2, 4)
    assert pipeline.paths.output == Path("elsewhere")


def test_texts_are_read_as_on_the_command_line() -> None:
    config = ExperimentConfig(
        "x", dataset="shakespeare_char", dtype="bfloat16", window_pattern="SL", window=8,
        attention="window", d_ff="8/3", position={"name": "rope", "theta": 5},
    ).pipeline(0)  # fmt: skip

    assert config.pretrain.data[0].name == "tinyshakespeare" and config.tokenizer.name == "char"
    assert config.pretrain.training.precision == "bf16"
    assert (config.model.window_pattern, config.model.d_ff) == ("SL", 1024)
    assert config.model.position.options == {"theta": 5}


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_head": 8}, ["--num_head: no such flag", "did you mean 'num_heads'"]),
    ({"num_heads": 5, "hidden_size": 384}, ["d_model=384 is not a multiple of n_heads=5"]),
    ({"num_heads": 0, "num_layers": -1}, ["n_heads=0", "n_layers=-1"]),
    ({"position": "ropee"}, ["did you mean 'rope'"]),
    ({"position": {"name": "rope", "thet": 1}}, ["it accepts theta"]),
    ({"seeds": []}, ["seeds=[]: at least one"]),
    ({"seeds": [1, 1]}, ["seeds=[1, 1]: at least one, and each once"]),
    ({"seeds": [0, -1]}, ["seed=-1"]),
    ({"num_epochs": 0}, ["num_epochs=0 must be above 0"]),
    ({"num_epochs": float("nan")}, ["num_epochs=nan must be above 0"]),
    ({"num_epochs": float("inf")}, ["num_epochs=inf must be above 0"]),
    ({"num_epochs": 1, "max_steps": 5}, ["num_epochs and max_steps: give one of them"]),
    ({"threads": 0}, ["threads=0"]),
    ({"seed": 3}, ["pretrain.training.seed: say it by seeds"]),
    ({"overrides": ["seed=3", "name=x"]}, ["seed: say it by seeds", "name: say it by experiment"]),
    ({"overrides": ["paths.output=x"]}, ["paths.output: say it by output"]),
    ({"overrides": ["model.d_modl=3"]}, ["did you mean 'd_model'"]),
    ({"preset": "gpt3"}, ["unknown preset 'gpt3'"]),
    ({"experiment_name": "a/b"}, ["experiment_name: run name 'a/b'"]),
]


@pytest.mark.parametrize(("fields", "parts"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_fields_are_told(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ExperimentConfig(**{"experiment_name": "wide", **fields})

    for part in parts:
        assert part in str(error.value)


def test_jobs_below_one_are_refused() -> None:
    for jobs in (0, -1):
        with pytest.raises(ConfigError, match=f"jobs={jobs}: at least 1"):
            ArchitectureExperiment(ExperimentConfig("wide"), jobs=jobs)


Make = Callable[..., ExperimentConfig]


@pytest.fixture
def make(small: dict[str, Any], tmp_path: Path) -> Make:
    """Config of a small experiment: ``make("a", {"model.norm": "rmsnorm"}, seeds=[0, 1])``."""

    def make(name: str, changes: dict[str, Any] | None = None, **fields: Any) -> ExperimentConfig:
        overrides = as_overrides({**small, **(changes or {})})
        given = {"overrides": overrides, "output": tmp_path / "cells", **fields}
        return ExperimentConfig(name, **given)

    return make


def batches_of(config: PipelineConfig, folder: Path) -> list[torch.Tensor]:
    """Tokens of the first steps, more than one pass, as the stage reads them."""
    loader = PretrainStage(config, folder, None).loader()
    steps = loader.steps_per_epoch + 2
    return [batch.tokens_BT for step in range(steps) for batch in loader.batches(step)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_arms_of_one_seed_see_the_same_batches_in_the_same_order(
    make: Make, tmp_path: Path
) -> None:
    arm, other = make("a"), make("b", {"model.norm": "rmsnorm", "model.d_model": 32})

    first, second = (batches_of(config.pipeline(3), tmp_path) for config in (arm, other))

    assert equal(first, second)
    assert not equal(first, batches_of(arm.pipeline(4), tmp_path)), "another seed, another order"
    assert not equal(first[:20], first[20:40]), "the batches of a run differ"


def test_a_preset_with_a_seed_of_its_own_still_has_one_training_a_seed(
    make: Make, small: dict[str, Any], tmp_path: Path
) -> None:
    """Else all seeds would be one training, and the spread between them none."""
    preset = tmp_path / "seeded.json"
    section = {"extends": "gpt2", "pretrain": {"training": {"seed": 5}}}
    preset.write_text(json.dumps(section))

    config = make("a", preset=str(preset), seeds=[0, 1])

    assert [config.pipeline(seed).pretrain.training.seed for seed in (0, 1)] == [0, 1]
    assert not equal(*(batches_of(config.pipeline(seed), tmp_path) for seed in (0, 1)))


def test_weights_of_one_seed_are_the_same_and_of_another_not(make: Make, tmp_path: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = PretrainStage(make("a").pipeline(seed), tmp_path, None).build_model()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_epochs_are_passes_over_the_text(make: Make) -> None:
    experiment = ArchitectureExperiment(make("a", num_epochs=1.5))

    steps = experiment.cells[0].config.pretrain.training.max_steps

    tokens = 1.5 * experiment.text.train_tokens
    assert 0 <= steps * 4 * 32 - tokens < 4 * 32, "rounded up to a step"


def test_a_plugin_is_part_of_what_names_a_cell(make: Make, tmp_path: Path) -> None:
    plugin = tmp_path / "own.py"
    names = set()
    for text in ("x = 1", "x = 2"):
        plugin.write_text(text)
        names.add(ArchitectureExperiment(make("a", plugins=[plugin])).cells[0].name)

    assert len(names) == 2
