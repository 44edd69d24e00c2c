import math
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from modern_llm.evaluation import baselines
from modern_llm.evaluation.baselines import Baseline, hub_reachable, load_baseline
from modern_llm.evaluation.perplexity import perplexity
from modern_llm.evaluation.scores import NotEvaluated

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of random weights with a byte tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([END])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=256, eos_token_id=256, initializer_range=0.5,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def baseline(folder: Path) -> Baseline:
    found = load_baseline(str(folder))
    assert isinstance(found, Baseline)
    return found


def test_facts(baseline: Baseline, folder: Path) -> None:
    assert baseline.context == 32
    assert baseline.source == str(folder)
    assert baseline.n_params == sum(p.numel() for p in baseline.model.model.parameters())
    assert not baseline.model.training


def test_logits_are_those_of_the_whole_model(baseline: Baseline) -> None:
    tokens_BT = torch.randint(0, 257, (2, 9))
    with torch.no_grad():
        whole_BTV = baseline.model.model(tokens_BT).logits
        torch.testing.assert_close(baseline.model(tokens_BT), whole_BTV)
        at_M = torch.tensor([0, 5, 17])
        torch.testing.assert_close(
            baseline.model(tokens_BT, at_M=at_M), whole_BTV.flatten(0, 1)[at_M]
        )


def test_same_perplexity_as_the_loss_of_transformers(baseline: Baseline) -> None:
    text = "Twenty bytes of it."
    ids = [256, *baseline.tokenizer.encode(text)]
    batch = torch.tensor([ids])
    with torch.no_grad():
        loss = baseline.model.model(batch, labels=batch).loss
    token, *_ = perplexity(
        baseline.model, baseline.tokenizer, [text], key="t", context=baseline.context
    )
    assert token.key == "t/ctx32/stride32/bos"
    assert token.n == len(text)
    assert math.log(token.value) == pytest.approx(float(loss), rel=1e-6)


def test_tokenizer(baseline: Baseline) -> None:
    tokenizer = baseline.tokenizer
    assert tokenizer.bos_id == tokenizer.eos_id == 256
    text = f"typed {END} stays text"
    ids = tokenizer.encode(text)
    assert 256 not in ids
    assert tokenizer.decode([*ids, 256]) == text


def test_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    missing = load_baseline(str(tmp_path))
    assert isinstance(missing, NotEvaluated)
    assert missing.what == f"baseline {tmp_path}"
    assert "the folder cannot be read" in missing.why


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"harmless": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    missing = load_baseline(str(tmp_path))
    assert isinstance(missing, NotEvaluated)


@pytest.mark.parametrize("damage", ["missing", "shape", "torn", "config"])
def test_a_damaged_model_has_no_number(folder: Path, tmp_path: Path, damage: str) -> None:
    """The library fills a missing weight with random numbers, with a warning at most."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    file, name = path / "model.safetensors", "transformer.h.0.mlp.c_proj.weight"
    weights = safetensors.load_file(file)
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "config":
        (path / "config.json").write_text('{"model_type": "gpt2", "n_embd": "many"}')
    else:
        del weights[name]
        if damage == "shape":
            weights[name] = torch.zeros(3, 3)
        safetensors.save_file(weights, file, metadata={"format": "pt"})
    missing = load_baseline(str(path))
    assert isinstance(missing, NotEvaluated)
    assert missing.what == f"baseline {path}"
    assert damage != "missing" or name in missing.why


def test_no_hub_and_no_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(baselines, "hub_reachable", lambda: False)
    missing = load_baseline("nobody/has-this-model")
    assert isinstance(missing, NotEvaluated)
    assert missing.why == "the hub cannot be reached and there is no local copy; give a folder"


def test_hub_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub_reachable()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_reachable()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub_reachable()  # nobody listens there any more
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert hub_reachable()
