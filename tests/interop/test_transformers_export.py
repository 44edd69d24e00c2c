import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.config import DataConfig, ModelConfig, TokenizerConfig
from modern_llm.data.templates import Turn, prompt_ids
from modern_llm.data.tokenizer import Tokenizer, build_tokenizer
from modern_llm.errors import CheckpointError, ConfigError
from modern_llm.interop import transformers_export
from modern_llm.interop.shapes import shape_of
from modern_llm.interop.transformers_export import export_transformers
from modern_llm.models import ModernDecoderLM, VerifierModel
from modern_llm.models.weights import model_weights
from modern_llm.training.checkpoint import write_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 48,
    "init_std": 0.3,
}  # fmt: skip
LLAMA = {**SIZES, "n_kv_heads": 2}
GPT2 = {
    **SIZES, "norm": "layernorm", "position": "learned", "ffn": "standard", "bias": True,
    "activation": "gelu_tanh",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    data = DataConfig(cache_dir=tmp_path_factory.mktemp("cache"))
    texts = ["Tom has 3 apples and buys 4 more. How many apples has he now?"] * 20
    return build_tokenizer(
        TokenizerConfig(name="bpe"), vocab_size=320, texts=lambda: iter(texts), data=data
    )


@pytest.fixture
def save(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., tuple[Path, ModernDecoderLM]]:
    """Write a checkpoint of a random model whose norms and biases are random too."""

    def write(fields: dict[str, Any], **changes: Any) -> tuple[Path, ModernDecoderLM]:
        torch.manual_seed(0)
        config = ModelConfig(**{**fields, **changes})
        model = ModernDecoderLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        folder = tmp_path / "checkpoint"
        write_checkpoint(
            folder,
            weights=model_weights(model),
            meta={"model": config.model_dump(mode="json"), "stage": "sft", "step": 7},
            tokenizer_json=tokenizer.to_json(),
            trainer_state=None,
        )
        return folder, model

    return write


@pytest.mark.parametrize(
    ("fields", "changes", "architecture"),
    [
        (LLAMA, {}, "LlamaForCausalLM"),
        (LLAMA, {"tie_embeddings": False, "n_kv_heads": 1}, "LlamaForCausalLM"),
        (LLAMA, {"position": {"name": "rope", "theta": 500_000}}, "LlamaForCausalLM"),
        (LLAMA, {"bias": True, "d_ff": 40, "norm_eps": 1e-3}, "LlamaForCausalLM"),
        (GPT2, {}, "GPT2LMHeadModel"),
        (GPT2, {"activation": "gelu", "tie_embeddings": False}, "GPT2LMHeadModel"),
        (GPT2, {"activation": "relu", "bias": False, "d_ff": 40}, "GPT2LMHeadModel"),
    ],
)
def test_reloaded_logits_are_those_of_the_model(
    save: Any, tmp_path: Path, fields: dict[str, Any], changes: dict[str, Any], architecture: str
) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint, model = save(fields, **changes)
    done = export_transformers(checkpoint, tmp_path / "export")
    assert done is not None
    assert done.architecture == architecture
    assert done.max_difference < 1e-4

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        done.folder, dtype=torch.float32
    ).eval()
    assert type(loaded).__name__ == architecture
    tokens_BT = torch.randint(0, 320, (3, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, theirs = model(tokens_BT), loaded(tokens_BT).logits
    assert float(ours.abs().max()) > 1
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    expected = sum(p.numel() for p in model.parameters())
    if changes.get("bias", fields.get("bias")) or architecture == "LlamaForCausalLM":
        assert sum(p.numel() for p in loaded.parameters()) == expected


def test_greedy_continuations_agree(save: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from modern_llm.models import generate

    checkpoint, model = save(LLAMA)
    done = export_transformers(checkpoint, tmp_path / "export")
    assert done is not None
    loaded = transformers.AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    assert loaded.generation_config.eos_token_id is not None
    prompt = [5, 99, 42, 7]
    theirs = loaded.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    (ours,) = generate(model, [prompt], max_new_tokens=20, eos_id=None)
    assert theirs[0, len(prompt) :].tolist() == ours.tokens


def test_tokenizer_and_chat_template(save: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    done = export_transformers(save(LLAMA)[0], tmp_path / "export")
    assert done is not None
    reader = transformers.AutoTokenizer.from_pretrained(done.folder)
    for text in ["Tom has 3 apples.", " two  spaces\n\tand caf\u00e9 \u4e2d \U0001f600", ""]:
        ids = reader(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert reader.decode(ids) == text
    assert reader.bos_token_id == tokenizer.bos_id
    assert reader.eos_token_id == tokenizer.eos_id
    assert reader.pad_token_id == tokenizer.pad_id
    chat = reader.apply_chat_template(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True, tokenize=False
    )
    assert reader(chat, add_special_tokens=False)["input_ids"] == prompt_ids(
        tokenizer, [Turn("user", "How many?")]
    )


@pytest.mark.parametrize(
    ("fields", "changes", "named"),
    [
        (LLAMA, {"attention": "window", "window": 8}, "model.attention=window"),
        (LLAMA, {"sink": "learned"}, "model.sink=learned"),
        (LLAMA, {"moe": {"n_experts": 4}}, "model.moe"),
        (LLAMA, {"qk_norm": True}, "model.qk_norm=true"),
        (LLAMA, {"norm_position": "post"}, "model.norm_position=post"),
        (LLAMA, {"norm": "layernorm"}, "model.norm=layernorm (needs rmsnorm)"),
        (LLAMA, {"position": "none"}, "model.position=none (needs rope)"),
        (GPT2, {"n_kv_heads": 2}, "model.n_kv_heads=2 (needs n_heads=4)"),
        (GPT2, {"ffn": "swiglu", "activation": "gelu"}, "model.ffn=swiglu (needs standard)"),
    ],
)
def test_what_stands_in_the_way_is_named(
    save: Any, tmp_path: Path, fields: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    checkpoint, _ = save(fields, **changes)
    with pytest.raises(ConfigError) as caught:
        export_transformers(checkpoint, tmp_path / "export")
    assert named in str(caught.value)
    assert not (tmp_path / "export").exists()


def test_aliases_of_parts_are_understood() -> None:
    config = ModelConfig(**{**LLAMA, "norm": "rms", "position": "rotary"})
    assert shape_of(config).architecture == "LlamaForCausalLM"


def test_an_export_is_protected(save: Any, tmp_path: Path) -> None:
    checkpoint, _ = save(LLAMA)
    target = tmp_path / "export"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    assert export_transformers(checkpoint, target, on_exists="skip") is None
    second = export_transformers(checkpoint, target)
    assert second is not None and second.folder != target
    assert [file.name for file in target.iterdir()] == ["mine.txt"]
    third = export_transformers(checkpoint, target, on_exists="replace")
    assert third is not None and third.folder == target
    (backup,) = tmp_path.glob("export.bak-*")
    assert (backup / "mine.txt").read_text() == "keep"
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_wrong_export_is_never_published(
    save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = save(LLAMA)
    real = transformers_export.shape_of

    def broken(config: ModelConfig) -> Any:
        shape = real(config)

        def weights(config: ModelConfig, ours: Any) -> Any:
            renamed = shape.weights(config, ours)
            name = "model.layers.1.self_attn.k_proj.weight"
            return {**renamed, name: renamed[name].flip(0)}

        return type(shape)(shape.architecture, shape.obstacles, shape.config, weights)

    monkeypatch.setattr(transformers_export, "shape_of", broken)
    with pytest.raises(CheckpointError, match="other logits"):
        export_transformers(checkpoint, tmp_path / "export")
    monkeypatch.undo()
    template = transformers_export.CHAT_TEMPLATE.replace("eos_token", "bos_token")
    monkeypatch.setattr(transformers_export, "CHAT_TEMPLATE", template)
    with pytest.raises(CheckpointError, match="other ids"):
        export_transformers(checkpoint, tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="other ids"):
        export_transformers(checkpoint, tmp_path / "export", on_exists="replace")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "export"]
    assert (tmp_path / "export" / "mine.txt").read_text() == "keep"


def test_a_damaged_checkpoint_and_a_verifier_are_refused(
    save: Any, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    verifier = VerifierModel(ModelConfig(**LLAMA))
    folder = tmp_path / "verifier"
    meta = {"model": verifier.config.model_dump(mode="json")}
    write_checkpoint(
        folder,
        weights=model_weights(verifier),
        meta=meta,
        tokenizer_json=tokenizer.to_json(),
        trainer_state=None,
    )
    with pytest.raises(ConfigError, match="is a verifier"):
        export_transformers(folder, tmp_path / "export")
    checkpoint, _ = save(LLAMA)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        export_transformers(checkpoint, tmp_path / "export")
