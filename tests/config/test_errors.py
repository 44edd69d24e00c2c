"""What a wrong config is told: all mistakes at once, each with path, value, rule and a way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import ModelConfig, PipelineConfig, load_config
from modern_llm.errors import ConfigError

Told = Callable[..., list[str]]


@pytest.fixture
def path(make_tiny: Callable[..., Path]) -> Path:
    sizes = {"model.d_model": 128, "model.n_heads": 4, "model.n_kv_heads": 2}
    return make_tiny({**sizes, "dpo.max_answer_tokens": 32, "training.batch_size": 32})


@pytest.fixture
def told(path: Path) -> Told:
    """What a config with these overrides is told, line by line."""

    def call(*overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as error:
            load_config(path, overrides)
        head, *lines = str(error.value).splitlines()
        assert head == f"config {path}:"
        assert all(line.startswith("  ") for line in lines)
        return [line.strip() for line in lines]

    return call


def test_many_mistakes_are_told_at_once(told: Told) -> None:
    lines = told(
        *("model.d_modl=64", "model.dropout=1.5", "model.norm_position=sideways", "seed=x"),
        *("sft.training.precision=fp8", "eval.perplexity.0.splt=test", "dpo.beta=0", "colour=red"),
    )
    assert len(lines) == 8
    starts = {line.split(":")[0] for line in lines}
    assert starts == {
        *("model.d_modl", "model.dropout=1.5", "model.norm_position='sideways'", "seed='x'"),
        *("sft.training.precision='fp8'", "eval.perplexity.0.splt", "dpo.beta=0", "colour"),
    }
    text = "\n".join(lines)
    assert "model.d_modl: unknown field; did you mean 'd_model'? (fields here: activation" in text
    assert "eval.perplexity.0.splt: unknown field; did you mean 'split'?" in text
    assert "model.norm_position='sideways': Input should be 'pre' or 'post'" in text
    assert "sft.training.precision='fp8': Input should be " in text


def test_a_shared_mistake_is_told_once(told: Told) -> None:
    assert told("training.lr=-1") == ["training.lr=-1: Input should be greater than 0"]
    assert told("dpo.training.lr=-1") == ["dpo.training.lr=-1: Input should be greater than 0"]
    [line] = told("training.wormup=3")
    assert line.startswith("training.wormup: unknown field; did you mean 'warmup'?")


def test_a_union_is_one_field(told: Told) -> None:
    [line] = told("training.warmup=soon")
    assert line.startswith("training.warmup='soon': Input should be a valid integer")
    assert ", or Input should be a valid number" in line


def test_a_missing_field_is_named(told: Told) -> None:
    assert told('model={"d_model": 8}') == [
        f"model.{name}: is required"
        for name in ("vocab_size", "n_layers", "n_heads", "max_seq_len")
    ]
    assert told('pretrain.data=[{"kind": "text"}]') == ["pretrain.data.0.name: is required"]


def test_a_section_and_a_component_say_what_they_are(told: Told) -> None:
    assert told("dpo=3") == ["dpo=3: should be a section"]
    assert told("model.norm=3") == ["model.norm=3: should be a name, or name and options"]
    assert told('model.norm={"name": 3}') == ["model.norm.name=3: Input should be a valid string"]
    assert told("sft.data=[3]") == ["sft.data.0=3: should be a name, or name and options"]


def test_an_alias_is_suggested_too(told: Told) -> None:
    [line] = told("model.n_embed=8")
    assert "did you mean 'n_embd'?" in line


# --- rules between fields -----------------------------------------------------------------------

SIZES = {"vocab_size": 64, "d_model": 48, "n_layers": 1, "n_heads": 6, "max_seq_len": 16}


def problems(**changes: Any) -> str:
    with pytest.raises(ValueError) as error:
        ModelConfig(**{**SIZES, **changes})
    return str(error.value)


def test_sizes_that_do_not_divide_are_told_together_with_sizes_that_do(told: Told) -> None:
    lines = told("model.n_heads=5", "model.n_kv_heads=3")
    assert lines == [
        "model: d_model=128 is not a multiple of n_heads=5: use n_heads from [1, 2, 4, 8]",
        "model: n_kv_heads=3 must divide n_heads: use one of [1, 5]",
    ]
    assert "use one of [1, 2, 3, 6]" in problems(n_kv_heads=4)
    # 320 is not divisible by 12, whatever is said of it.
    text = problems(d_model=320, n_heads=12, n_kv_heads=12)
    assert "d_model=320 is not a multiple of n_heads=12: use n_heads from [5, 8, 10, 16]" in text


def test_windows_and_sinks_belong_together() -> None:
    assert "attention=window needs window=<tokens>" in problems(attention="window")
    for wrong in ({"window": 4}, {"n_sinks": 2}):
        assert "window, n_sinks and window_pattern need attention=window" in problems(**wrong)
    assert ModelConfig(**SIZES, attention="window", window=4, n_sinks=2).n_sinks == 2
    told = problems(attention="window", window=13, n_sinks=4)
    assert "window + n_sinks = 17 exceeds max_seq_len=16" in told
    assert ModelConfig(**SIZES, attention="window", window=12, n_sinks=4).window == 12


def test_experts() -> None:
    assert "top_k=3 exceeds n_experts=2" in problems(moe={"n_experts": 2, "top_k": 3})
    told = problems(moe={"n_experts": 2, "every": 2})
    assert "moe.every=2 exceeds n_layers=1: no layer has experts" in told


def test_a_gated_feed_forward_has_its_own_activation() -> None:
    told = problems(activation="relu")
    assert "activation=relu has no effect with ffn=swiglu, which has its own" in told
    assert ModelConfig(**SIZES, ffn="standard", activation="relu").activation == "relu"


def test_widths_follow_the_feed_forward() -> None:
    assert ModelConfig(**SIZES).d_ff == 128  # 8/3 of 48 is 128, a multiple of 32
    assert ModelConfig(**{**SIZES, "d_model": 60}).d_ff == 160
    assert ModelConfig(**SIZES, ffn="standard").d_ff == 192
    assert ModelConfig(**SIZES, ffn={"name": "standard"}).d_ff == 192
    assert ModelConfig(**SIZES).n_kv_heads == 6
    assert ModelConfig(**SIZES).head_size == 8


def test_numbers_in_quotes_count_as_numbers(path: Path) -> None:
    """YAML and shells quote; a default that follows such a field must not miss it."""
    quoted = {name: str(value) for name, value in SIZES.items()}
    assert ModelConfig.model_validate(quoted) == ModelConfig(**SIZES)
    config = load_config(path, ['model.max_seq_len="96"', 'max_steps="2"', 'seed="3"'])
    assert {config.sft.training.seq_len, config.pretrain.training.seq_len} == {96}
    assert (config.dpo.training.max_steps, config.dpo.training.seed) == (2, 3)


@pytest.mark.parametrize("value", ["-1", "0", "many", "null", "1e99", "[1]"])
def test_a_wrong_size_is_told_once(told: Told, value: str) -> None:
    for name in ("n_heads", "d_model", "max_seq_len"):
        [line] = told(f"model.{name}={value}")
        assert line.startswith(f"model.{name}=")


def test_batches_that_do_not_divide(told: Told) -> None:
    lines = told("training.batch_size=30", "training.micro_batch_size=4")
    assert lines == [
        "training: micro_batch_size=4 must divide batch_size=30: use one of [3, 5, 6, 10, 15, 30]"
    ]


def test_rows_longer_than_the_context(told: Told) -> None:
    lines = told("sft.training.seq_len=256", "dpo.max_prompt_tokens=100")
    assert lines == [
        "sft.training.seq_len=256 exceeds model.max_seq_len=128",
        "dpo.max_prompt_tokens + dpo.max_answer_tokens = 132 exceeds model.max_seq_len=128",
    ]


def test_training_fields_that_would_do_nothing_are_refused(path: Path, told: Told) -> None:
    for stage in ("sft", "dpo", "verifier"):
        [line] = told(f"{stage}.training.doc_mask=true")
        assert line.startswith(f"{stage}.training.doc_mask=true has no effect here: only pretrain")
    [line] = told("dpo.training.seq_len=20")
    assert line == (
        "dpo.training.seq_len=20 has no effect here: a row has max_prompt_tokens + "
        "2 * max_answer_tokens = 128; leave it out"
    )
    [line] = told("verifier.max_validation_rows=5")
    assert line.startswith("verifier.max_validation_rows: unknown field")


def test_what_all_stages_share_goes_where_it_does_something(path: Path) -> None:
    shared = ["training.doc_mask=true", "training.seq_len=20", "dpo.max_answer_tokens=50"]
    config = load_config(path, shared)
    stages = (config.pretrain, config.sft, config.dpo, config.verifier)
    assert [s.training.doc_mask for s in stages] == [True, False, False, False]
    assert [s.training.seq_len for s in stages] == [20, 20, 64 + 2 * 50, 20]
    assert type(config).model_validate(config.model_dump(mode="json")) == config


def test_a_weight_that_does_nothing_is_refused(path: Path, told: Told) -> None:
    lines = told(
        "sft.data.0.weight=2",
        "verifier.data.0.weight=1",
        'pretrain.validation=[{"name": "synthetic", "weight": 1}]',
        "eval.reasoning.source.weight=1",
        "eval.perplexity.0.source.weight=1",
        'eval.text_metrics=[{"metric": "rouge", "source": {"name": "alpaca", "weight": 3}}]',
    )
    assert [line.split(":")[0] for line in lines] == [
        *("pretrain.validation.0", "sft.data.0", "verifier.data.0"),
        *("eval.perplexity.0.source", "eval.text_metrics.0.source", "eval.reasoning.source"),
    ]
    assert all("has no effect here; only sources of pretrain.data" in line for line in lines)
    assert load_config(path, ["pretrain.data.0.weight=2"]).pretrain.data[0].weight == 2
    [line] = told("pretrain.data.0.weight=0")
    assert line == "pretrain.data.0: weight=0.0 must be above 0; leave the source out instead"


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("dpo.loss=hinge", "dpo.loss='hinge': Input should be 'sigmoid' or 'ipo'"),
        ('tokenizer={"name": "file"}', "path belongs to the tokenizer 'file', which needs it"),
        ("tokenizer.path=x.json", "path belongs to the tokenizer 'file', which needs it"),
        ("tokenizer.name=sentencepiece", "Input should be 'bpe', 'char', 'gpt2' or 'file'"),
        ("data.replay=1", "data.replay=1: Input should be less than 1"),
        ("data.max_bad_rows=-1", "data.max_bad_rows=-1"),
        ("training.max_steps=0", "training.max_steps=0: Input should be greater than 0"),
        ("training.lr=Infinity", "training.lr=inf: Input should be a finite number"),
        ("training.betas=[0.9]", "training.betas.1: is required"),
        ("pretrain.data=[]", "pretrain.data=[]: List should have at least 1 item"),
        ("eval.reasoning.split=train", "Input should be 'validation' or 'test'"),
        ("max_steps=-1", "max_steps=-1: Input should be greater than 0"),
    ],
)
def test_rules_of_single_fields(told: Told, override: str, rule: str) -> None:
    lines = told(override)
    assert len(lines) == 1
    assert rule in lines[0]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (
            ['tokenizer={"name": "gpt2", "max_train_mb": 5}'],
            "tokenizer: max_train_mb=5 has no effect with the tokenizer 'gpt2', which is not "
            "trained here; leave it at 100",
        ),
        (
            ["training.schedule=constant", "training.min_lr_ratio=0.2"],
            "training: min_lr_ratio=0.2 has no effect with schedule=constant; leave it out, or set "
            "it to 1",
        ),
        (
            ["training.warmup=1.0"],
            "training.warmup: warmup=1.0 is a share of the steps, which must be below 1; write a "
            "number of steps without a point",
        ),
    ],
)
def test_what_would_do_nothing_or_something_else(
    told: Told, overrides: list[str], rule: str
) -> None:
    assert told(*overrides) == [rule]


def test_a_constant_rate_has_no_floor(path: Path) -> None:
    for ratio in ([], ["training.min_lr_ratio=1"]):
        config = load_config(path, ["training.schedule=constant", "training.warmup=3", *ratio])
        assert config.sft.training.warmup == 3
        assert PipelineConfig.model_validate_json(str(config)) == config


def test_a_mixture_is_checked_before_anything_is_built(told: Told) -> None:
    two = ['pretrain.data=[{"name": "synthetic", "weight": 1}, "synthetic"]']
    [line] = told(*two)
    assert line.startswith("pretrain: weights sum to 1 and leave nothing to the sources without")
    [line] = told(*two, "pretrain.data.0.weight=0.0001")
    assert line.startswith("pretrain: weight=0.0001 is a share of 0.0001, below 0.001")


def test_ipo_has_no_label_smoothing(told: Told) -> None:
    [line] = told("dpo.loss=ipo", "dpo.label_smoothing=0.1")
    assert line == "dpo: label_smoothing belongs to loss=sigmoid; ipo has none"


NAMES = [
    "../../x",
    "a/b",
    "",
    "a\nb",
    "a\n",
    ".",
    "..",
    "-x",
    ".hidden",
    "a b",
    "a;b",
    "$(x)",
    "\x00",
]


@pytest.mark.parametrize("name", [*NAMES, "x" * 101, "\u00e9t\u00e9", "_x", "a\\b"])
def test_a_run_name_is_one_plain_folder(told: Told, name: str) -> None:
    [line] = told(f"name={json.dumps(name)}")
    assert line.startswith(f"name: run name {name!r}: use letters, digits, '.', '_' and '-'")


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "x" * 100, "local-smoke_20260101-000000"])
def test_a_plain_name_is_taken(path: Path, name: str) -> None:
    assert load_config(path, [f'name="{name}"']).name == name


# --- keys of scores


def tasks(kind: str, *tasks: object) -> str:
    return f"eval.{kind}={json.dumps(tasks)}"


ONE, OTHER = ({"name": "jsonl", "path": f"{x}.jsonl"} for x in "ab")


@pytest.mark.parametrize("own", [{}, {"context": 64}, {"max_texts": 9}, {"name": "jsonl"}])
def test_two_tasks_of_one_key_are_refused(told: Told, own: dict[str, Any]) -> None:
    override = tasks("perplexity", {"source": ONE}, {"source": OTHER, **own})
    assert told(override) == [
        "eval: perplexity.0 and perplexity.1 would have the same key, jsonl.test: give one a name"
    ]


def test_two_text_metrics_of_one_key_are_refused(told: Told) -> None:
    first, second = ({"metric": "bleu", "source": source} for source in (ONE, OTHER))
    [line] = told(tasks("text_metrics", first, {**first, "metric": "rouge"}, second))
    assert "text_metrics.0 and text_metrics.2 would have the same key, jsonl.test bleu" in line


def test_names_splits_and_protocols_tell_tasks_apart(path: Path) -> None:
    config = load_config(
        path,
        [tasks("perplexity", {"source": ONE}, {"source": OTHER, "name": "b-2.x_y"},
               {"source": OTHER, "split": "validation"}, {"source": ONE, "context": 64},
               {"source": ONE, "max_texts": 9})],
    )  # fmt: skip
    keys = [task.key for task in config.eval.perplexity]
    assert keys == ["jsonl.test", "b-2.x_y.test", "jsonl.validation", "jsonl.test", "jsonl.test"]


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a b", "x" * 101])
def test_a_task_name_fits_into_a_key(told: Told, name: str) -> None:
    [line] = told(tasks("perplexity", {"source": ONE, "name": name}))
    assert line.startswith(f"eval.perplexity.0.name={name!r}: String should")
