import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import load_config
from modern_llm.errors import ConfigError
from modern_llm.experiments.train_flags import translate

ARCH = Path(__file__).resolve().parents[2] / "configs" / "arch"
FLAGS = [
    *("--max_iters=200", "--dataset=shakespeare", "--compile=False", "--position_encoding=rope"),
    *("--normalization=rmsnorm", "--ffn_type=swiglu", "--norm_position=pre"),
    *("--weight_tying=False", "--batch_size=12", "--gradient_accumulation_steps=4"),
    *("--learning_rate=6e-4", "--dtype=bfloat16", "--log_interval=10"),
    *("--gradient_log_interval=50", "--eval_interval=100"),
]


def test_all_flags_reach_their_fields() -> None:
    config = load_config(ARCH / "gpt2.json", translate(FLAGS))
    training, model = config.pretrain.training, config.model
    assert (training.max_steps, training.lr, training.precision) == (200, 6e-4, "bf16")
    assert (training.micro_batch_size, training.batch_size) == (12, 48)
    assert (training.log_every, training.grad_log_every, training.eval_every) == (10, 50, 100)
    assert training.compile is False
    assert [source.name for source in config.pretrain.data] == ["tinyshakespeare"]
    assert config.tokenizer.name == "bpe"
    assert model.short_name == "6L-6H-384D-RoPE-RMS-SwiGLU-PreNorm"
    assert not model.tie_embeddings
    assert model.d_ff == 1024  # 8/3, not the 4 of the feed-forward that was there


def test_model_sizes_by_the_names_of_others_and_dotted_ones() -> None:
    flags = ["--n_layer=2", "--n-head=4", "--n_embd=64", "--block_size=32", "--model.qk_norm=true"]
    lengths = ["--seq_len=32", "--sft.training.seq_len=32", "--verifier.training.seq_len=32"]
    pairs = ["--dpo.max_prompt_tokens=16", "--dpo.max_answer_tokens=8"]
    flags = [*flags, *lengths, *pairs, "--dataset=shakespeare_char"]
    config = load_config(ARCH / "llama.json", [*translate(flags), "model.n_kv_heads=2"])
    model = config.model
    assert (model.n_layers, model.n_heads, model.d_model, model.max_seq_len) == (2, 4, 64, 32)
    assert model.qk_norm and config.tokenizer.name == "char"


def test_another_data_set_keeps_the_tokenizer() -> None:
    assert translate(["--dataset=tinystories"]) == ['pretrain.data=["tinystories"]']


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--max_itres=3"], "--max_itres: no such flag; did you mean 'max_iters'?"),
        (["--compile"], "--compile: write --name=value"),
        (["--gradient_accumulation_steps=4"], "needs --batch_size"),
        (["--batch_size=many"], "must be counts"),
    ],
)
def test_what_cannot_be_translated_is_told(flags: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(flags)
    assert told in str(caught.value)


def test_the_script_trains(
    cli: Callable[..., Any], make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The pretrain stage and nothing else, by the same trainer."""
    config = make_tiny()
    done = cli(
        "scripts/train.py", config, "--max_iters=3", "--n_embd=64", "--num_heads=4",
        "--learning_rate=2e-3", "--run-name=mine", "pretrain.training.log_every=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mine"
    assert [f.name for f in run.iterdir() if f.is_dir()] == ["pretrain"]
    result = json.loads((run / "pretrain" / "result.json").read_text())
    assert result["training"]["steps"] == 3
    assert result["model"]["summary"] == "1L-4H-64D-RoPE-RMS-SwiGLU-PreNorm"


def test_flags_of_others_are_for_train_alone(cli: Callable[..., Any]) -> None:
    done = cli("run", "--max_iters=3")
    assert done.returncode == 2
    assert "unrecognized arguments: --max_iters=3" in done.stderr
