import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.config import DataConfig, ModelConfig, TokenizerConfig
from modern_llm.data.templates import Turn, prompt_ids
from modern_llm.data.tokenizer import Tokenizer, build_tokenizer
from modern_llm.errors import CheckpointError, ConfigError
from modern_llm.inference.chat import (
    BEGINNINGS,
    HELP,
    HELP_PLAIN,
    QUESTIONS,
    chat,
    remembered,
    show_samples,
)
from modern_llm.inference.session import Sampler, Session, decode_threads, load_model
from modern_llm.models import ModernDecoderLM, VerifierModel, generate
from modern_llm.models.cost import params_by_kind
from modern_llm.models.weights import model_weights
from modern_llm.training.checkpoint import write_checkpoint

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64, init_std=0.3
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    data = DataConfig(cache_dir=tmp_path_factory.mktemp("cache"))
    texts = lambda: iter(["a few words to learn, a few words more"] * 9)  # noqa: E731
    return build_tokenizer(TokenizerConfig(name="bpe"), vocab_size=290, texts=texts, data=data)


def write(folder: Path, model: Any, tokenizer: Tokenizer, /, **meta: Any) -> Path:
    described = {"model": model.config.model_dump(mode="json"), "stage": "sft", "step": 7}
    write_checkpoint(
        folder,
        weights=model_weights(model),
        meta={**described, **meta},
        tokenizer_json=tokenizer.to_json(),
        trainer_state=None,
    )
    return folder


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Session:
    torch.manual_seed(0)
    model = ModernDecoderLM(CONFIG)
    folder = write(tmp_path_factory.mktemp("run") / "final", model, tokenizer)
    loaded = load_model(folder, device="cpu")
    for name, tensor in model.weights().items():
        assert torch.equal(tensor, loaded.model.weights()[name])
    return loaded


def test_facts(session: Session) -> None:
    facts = session.facts()
    assert facts["stage"] == "sft, step 7"
    assert facts["parameters"] == f"{sum(p.numel() for p in session.model.parameters()):,}"
    assert facts["shape"] == "2 layers, 32 wide, 4 heads (2 key/value)"
    assert facts["parts"] == "rmsnorm, rope, swiglu"
    assert facts["model"] == CONFIG.short_name
    assert facts["context"] == "64 tokens"
    assert facts["vocabulary"] == f"{session.tokenizer.n_vocab} ids"
    assert facts["tokenizer"] == f"BPE, {session.tokenizer.sha256[:12]}"
    assert facts["parent"] == "none" and facts["trained on"] == "?"
    size = sum(path.stat().st_size for path in session.folder.iterdir())
    assert facts["on disk"] == f"{size / 1e6:.1f} MB"
    assert not session.model.training


def test_facts_of_a_checkpoint_that_says_more(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parent = {"stage": "pretrain", "sha256": "ab" * 32}
    more = {"data": ["alpaca", "gsm8k", "alpaca"], "data_fingerprint": "cd" * 32, "parent": parent}
    folder = write(tmp_path / "final", ModernDecoderLM(CONFIG), tokenizer, run="mine", **more)
    facts = load_model(folder, device="cpu").facts()
    assert facts["trained on"] == "alpaca, gsm8k with fingerprint cdcdcdcdcdcd"
    assert facts["parent"] == "pretrain abababababab"
    assert facts["run"] == "mine"


def test_parameters_by_kind() -> None:
    """Counted by hand: D 32, N 4, K 2, H 8, F 96, E 3, V 300, T 64; one of two layers has E."""
    parts = {"position": "learned", "tie_embeddings": False, "d_ff": 96}
    config = ModelConfig(**{**CONFIG.model_dump(), **parts, "moe": {"n_experts": 3, "every": 2}})
    model = ModernDecoderLM(config)
    assert params_by_kind(model) == {
        "embedding": 300 * 32 + 64 * 32,
        "attention": 2 * (32 * (4 + 2 * 2) * 8 + 32 * 32),
        "feed-forward": 3 * 32 * 96,
        "experts": 3 * (3 * 32 * 96) + 3 * 32,
        "norms": 2 * 2 * 32 + 32,
        "head": 300 * 32,
    }
    assert sum(params_by_kind(model).values()) == model.cost(64).params


def test_complete_uses_the_template_of_training(session: Session) -> None:
    prompts = ["How many?", [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]]
    replies = session.complete(prompts, sampler=Sampler(max_new_tokens=12))
    rows = [prompt_ids(session.tokenizer, prompt) for prompt in prompts]
    expected = generate(
        session.model, rows, max_new_tokens=12, eos_id=session.tokenizer.eos_id, n_vocab=290
    )
    assert [r.text for r in replies] == [session.tokenizer.decode(e.tokens) for e in expected]
    assert [r.n_tokens for r in replies] == [len(e.tokens) for e in expected]


def test_plain_text_goes_on_after_bos(session: Session) -> None:
    (reply,) = session.complete(["a few"], sampler=Sampler(max_new_tokens=9), plain=True)
    row = [session.tokenizer.bos_id, *session.tokenizer.encode("a few")]
    (done,) = generate(
        session.model, [row], max_new_tokens=9, eos_id=session.tokenizer.eos_id, n_vocab=290
    )
    assert reply.text == session.tokenizer.decode(done.tokens)
    assert session.new_tokens(Sampler()) == 32  # half of the context
    with pytest.raises(ConfigError, match="dialogue"):
        session.complete([[Turn("user", "a")]], plain=True)


def test_long_prompts_are_cut_from_their_start(session: Session) -> None:
    sampler = Sampler(max_new_tokens=16)
    text = "words " * 200
    for plain in (False, True):
        long, ending = session.complete([text, text[600:]], sampler=sampler, plain=plain)
        assert long.text == ending.text
        assert long.n_tokens > 0


def test_samples_depend_on_the_seed_and_not_on_neighbours(session: Session) -> None:
    sampler = Sampler(max_new_tokens=12, temperature=1.0)
    alone = session.complete(["one"], sampler=sampler)
    beside = session.complete(["one", "another one", "one"], sampler=sampler)
    assert beside[0] == alone[0]
    assert beside[2] != alone[0]  # the same prompt, drawn again
    other = session.complete(["one"], sampler=Sampler(max_new_tokens=12, temperature=1.0, seed=1))
    assert other != alone


@pytest.mark.parametrize("n", [0, 61, 1000])
def test_too_many_new_tokens(session: Session, n: int) -> None:
    with pytest.raises(ConfigError, match="must be from 1 to 60"):
        session.complete(["a"], sampler=Sampler(max_new_tokens=n))


def test_one_thread_for_few_rows() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with decode_threads(torch.device("cpu"), 1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with decode_threads(torch.device("cpu"), 16):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bf16(session: Session) -> None:
    low = load_model(session.folder, device="cpu", precision="bf16")
    assert low.complete(["a"], sampler=Sampler(max_new_tokens=4))[0].n_tokens <= 4
    assert low.facts()["device"] == "cpu, bf16"
    with pytest.raises(ConfigError, match="fp16"):
        load_model(session.folder, device="cpu", precision="fp16")


def test_refused_checkpoints(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "nowhere", device="cpu")
    verifier = write(tmp_path / "verifier", VerifierModel(CONFIG), tokenizer)
    with pytest.raises(ConfigError, match="is a verifier"):
        load_model(verifier, device="cpu")
    foreign = write(tmp_path / "foreign", ModernDecoderLM(CONFIG), tokenizer, model={"a": 1})
    with pytest.raises(CheckpointError, match="no valid model"):
        load_model(foreign, device="cpu")


def test_another_template_is_told(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "old", ModernDecoderLM(CONFIG), tokenizer, template_sha256="0" * 64)
    with caplog.at_level("WARNING", logger="modern_llm"):
        load_model(folder, device="cpu")
    assert "another chat template" in caplog.text


def run_chat(session: Session, lines: list[Any], **options: Any) -> list[str]:
    shown: list[str] = []
    rest: Iterator[Any] = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    chat(session, read=read, write=shown.append, sampler=Sampler(max_new_tokens=8), **options)
    assert next(rest, None) is None  # every line was read
    return shown


def test_chat(session: Session) -> None:
    shown = run_chat(session, ["hello", "", "again", "/clear", "hello", "/what", "/quit"])
    assert f"unknown command /what: {HELP}" in shown
    replies = [line.rpartition("\n")[0] for line in shown if "tokens/s" in line]
    assert len(replies) == 3
    (alone,) = session.complete(["hello"], sampler=Sampler(max_new_tokens=8))
    assert replies[0] == replies[2] == alone.text  # greedy, and /clear forgets
    turns = [Turn("user", "hello"), Turn("assistant", alone.text), Turn("user", "again")]
    (second,) = session.complete([turns], sampler=Sampler(max_new_tokens=8))
    assert replies[1] == second.text


@pytest.mark.parametrize("slash", ["", "/"])
def test_commands_with_and_without_a_slash(session: Session, slash: str) -> None:
    shown = run_chat(session, [f"{slash}clear", f"{slash}quit"])
    assert shown == [HELP, "(begun anew)"]


@pytest.mark.parametrize("end", [[], [EOFError], [KeyboardInterrupt]])
def test_chat_ends_with_the_input_and_with_ctrl_c(session: Session, end: list[Any]) -> None:
    assert run_chat(session, end) == [HELP, ""]  # the shell's prompt gets a line of its own


def test_plain_lines_are_continued_each_on_its_own(session: Session) -> None:
    shown = run_chat(session, ["a few", "words", "clear", "quit"], plain=True)
    alone = session.complete(["a few"], sampler=Sampler(max_new_tokens=8), plain=True)
    alone += session.complete(["words"], sampler=Sampler(max_new_tokens=8), plain=True)
    assert shown[0] == HELP_PLAIN
    assert [line.rpartition("\n")[0] for line in shown[1:3]] == [reply.text for reply in alone]


@pytest.mark.parametrize("plain", [True, False])
def test_samples(session: Session, plain: bool) -> None:
    sampler = Sampler(max_new_tokens=8, temperature=1.0, top_k=40)
    shown: list[str] = []
    show_samples(session, ["one", "one"], sampler=sampler, plain=plain, write=shown.append)
    (alone,) = session.complete(["one"], sampler=sampler, plain=plain)
    first, second = (line.split("\n", 2)[2].rpartition("\n") for line in shown)
    assert first[0] == alone.text
    assert second[0] != alone.text  # the same prompt, drawn again
    told = re.fullmatch(
        r"\((\d+) tokens, (\d+) tokens/s, first after ([\d.]+) s(, cut)?\)", first[2]
    )
    assert told is not None and int(told[1]) == alone.n_tokens
    defaults: list[str] = []
    show_samples(session, sampler=sampler, plain=plain, write=defaults.append)
    asked = [line.split("\n")[1].removeprefix("> ") for line in defaults]
    assert tuple(asked) == (BEGINNINGS if plain else QUESTIONS)


def test_the_first_token_comes_before_the_last(session: Session) -> None:
    """Its time is part of the whole, and has the reading of the prompt in it."""
    begin = time.perf_counter()
    (reply,) = session.complete(["a few words"], sampler=Sampler(max_new_tokens=32))
    assert 0 < reply.first_token_s < time.perf_counter() - begin


def test_ctrl_c_stops_an_answer(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modern_llm.inference.session.generate", interrupted)
    assert run_chat(session, ["hello", "/quit"])[-1] == "(stopped)"


def test_the_oldest_turns_are_forgotten(session: Session) -> None:
    turns: list[Turn] = []
    for i in range(20):
        turns += [Turn("user", f"question {i}"), Turn("assistant", f"answer {i}")]
    turns.append(Turn("user", "now?"))
    sampler = Sampler(max_new_tokens=8)
    kept = remembered(session, turns, sampler)
    assert 1 < len(kept) < len(turns)
    assert kept == turns[-len(kept) :]
    assert kept[0].role == "user"
    assert len(prompt_ids(session.tokenizer, kept)) <= 64 - 8
    one = [Turn("user", "x" * 500)]
    assert remembered(session, one, sampler) == one
