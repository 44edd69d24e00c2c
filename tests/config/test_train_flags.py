import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import load_config
from modern_llm.config.train_flags import sections, translate
from modern_llm.errors import ConfigError

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
    flags = [*flags, "--dataset=shakespeare_char"]
    config = load_config(ARCH / "llama.json", [*translate(flags), "model.n_kv_heads=2"])
    model = config.model
    assert (model.n_layers, model.n_heads, model.d_model, model.max_seq_len) == (2, 4, 64, 32)
    assert model.qk_norm and config.tokenizer.name == "char"


def test_another_data_set_keeps_the_tokenizer() -> None:
    assert translate(["--dataset=tinystories"]) == ['pretrain.data=["tinystories"]']


FLAT = """
# as other projects write it
attention_type: flash_attention
ffn_type: ff_swiglu
n_embd: 64
num_heads: 4
n_layers: 2
block_size: 32
max_iters: 200
batch_size: 12
gradient_accumulation_steps: 4
learning_rate: 6e-4
dtype: bfloat16
log_interval: 5
dataset: shakespeare_char
seed: 7
"""


def test_a_flat_file_reaches_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(FLAT)
    config = load_config(path, rewrite=sections)
    training, model = config.pretrain.training, config.model
    assert (model.d_model, model.n_heads, model.n_layers, model.max_seq_len) == (64, 4, 2, 32)
    assert (model.attention, model.ffn.name) == ("full", "swiglu")
    assert (training.max_steps, training.lr, training.precision) == (200, 6e-4, "bf16")
    assert (training.micro_batch_size, training.batch_size, training.seq_len) == (12, 48, 32)
    assert (training.log_every, training.seed, config.max_steps) == (5, 7, None)
    assert [source.name for source in config.pretrain.data] == ["tinyshakespeare"]
    assert (config.name, config.tokenizer.name) == ("theirs", "char")
    by_flags = load_config(path, translate(["--max_iters=3"]), rewrite=sections)
    assert by_flags.pretrain.training.max_steps == 3


def test_a_flat_file_may_have_sections_and_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text("preset: cpu-real\nn_layer: 2\nmodel: {qk_norm: true}\nname: mine\n")
    config, base = load_config(path, rewrite=sections), load_config("cpu-real")
    assert (config.name, config.model.n_layers, config.model.qk_norm) == ("mine", 2, True)
    assert config.pretrain == base.pretrain and config.model.n_kv_heads == base.model.n_kv_heads


def test_a_file_of_sections_stays_as_it_is() -> None:
    for name in ("gpt2", "local-smoke", "tacc"):
        assert load_config(name, rewrite=sections) == load_config(name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "n_embd: 64\nlearning_rte: 1\n",
            "learning_rte: no such name; did you mean 'learning_rate'?",
        ),
        ("n_embd: 64\nmodle: {}\n", "modle: no such name; did you mean 'model'?"),
        ("n_embd: 64\n7: 8\n", "7: no such name"),
        ("n_embd: 64\npreset: gpt2\nextends: llama\n", "preset and extends are the same"),
        ("preset: gtp2\n", "unknown preset 'gtp2'; did you mean 'gpt2'?"),
        ("n_embd: 64\nhidden_size: 64\n", "hidden_size is given twice, under two names"),
        ("n_embd: 64\nmodel: {hidden_size: 64}\n", "are the same field; give it once"),
        ("max_iters: 3\nlearning_rate: fast\n", "pretrain.training.lr='fast'"),
        ("max_iters: 3\ngradient_accumulation_steps: 2\n", "needs batch_size"),
        ("max_iters: 3\nbatch_size: [1]\n", "batch_size=[1] and"),
        ("n_embd: 320\nnum_heads: 12\n", "d_model=320 is not a multiple of n_heads=12"),
    ],
)
def test_a_flat_file_that_cannot_be_is_told_by_name(
    cli: Callable[..., Any], tmp_path: Path, text: str, told: str
) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    done = cli("scripts/train.py", path, cwd=ARCH.parents[1])
    assert done.returncode == 2
    assert told in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.yaml"]


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
