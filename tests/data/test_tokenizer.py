import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from modern_llm.config import DataConfig, TokenizerConfig
from modern_llm.data.making import Making, making
from modern_llm.data.tokenizer import MIN_IDS, SPECIALS, Tokenizer, build_tokenizer
from modern_llm.errors import ConfigError, DataError

TEXTS = ["Tom has 17 apples. 17 + 25 = 42.\n", "naïve café \u65e5\u672c", "<|eos|> typed"] * 20
FAST = settings(max_examples=60, deadline=None)
TYPED = st.sampled_from([*SPECIALS, "<0x41>", "<|", "|>", "\u0120", "\r\n", "\x00", " ", "42"])
ANY_TEXT = st.lists(st.one_of(st.text(), TYPED)).map("".join)


def build(name: str, folder: Path, vocab_size: int = 600) -> Tokenizer:
    config = DataConfig(cache_dir=folder)
    texts = lambda: iter(TEXTS)  # noqa: E731
    return build_tokenizer(
        TokenizerConfig(name=name), vocab_size=vocab_size, texts=texts, data=config
    )


@pytest.fixture(scope="module", params=["bpe", "char"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build(request.param, tmp_path_factory.mktemp("cache"))


@FAST
@given(text=ANY_TEXT)
def test_any_text_round_trips_without_special_ids(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.decode(ids, skip_special=False) == text
    assert not trained.special_ids & set(ids)
    assert all(0 <= i < trained.n_vocab for i in ids)


def test_special_ids_are_five_and_are_skipped(trained: Tokenizer) -> None:
    ids = [trained.bos_id, *trained.encode("a b"), trained.eos_id]
    assert len(trained.special_ids) == 5
    assert trained.decode(ids) == "a b"
    assert trained.decode(ids, skip_special=False) == "<|bos|>a b<|eos|>"
    assert trained.token(trained.pad_id) == "<|pad|>"
    assert trained.decode([10**6]) == ""


def test_digits_stand_alone(trained: Tokenizer) -> None:
    tokens = [trained.token(i) for i in trained.encode("17 + 1725 = 42")]
    assert all(sum(c.isdigit() for c in t) <= 1 for t in tokens)


def test_save_and_load_keep_all(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    trained.save(path)  # the same again: left as it is
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == trained.sha256
    assert loaded.encode("<|user|> 12") == trained.encode("<|user|> 12")
    assert {t["content"] for t in json.loads(path.read_text())["added_tokens"]} == set(SPECIALS)


def test_save_refuses_to_change_another(trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="another tokenizer"):
        trained.save(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_training_is_deterministic_and_cached(name: str, tmp_path: Path) -> None:
    first, again = build(name, tmp_path / "a"), build(name, tmp_path / "b")
    assert first.sha256 == again.sha256
    (cached,) = (tmp_path / "a" / "tokenizers").iterdir()
    before = cached.stat().st_mtime_ns
    assert build(name, tmp_path / "a").sha256 == first.sha256
    assert cached.stat().st_mtime_ns == before


def test_known_fingerprint_needs_no_text(tmp_path: Path) -> None:
    def unread() -> None:
        raise AssertionError("the texts were read")

    config = DataConfig(cache_dir=tmp_path)
    options = {"vocab_size": 300, "data": config, "fingerprint": "abc"}
    build_tokenizer(TokenizerConfig(), texts=lambda: iter(TEXTS), **options)
    build_tokenizer(TokenizerConfig(), texts=unread, **options)


def test_char_keeps_the_most_frequent(tmp_path: Path) -> None:
    tokenizer = build("char", tmp_path, vocab_size=MIN_IDS + 3)
    assert tokenizer.n_vocab == MIN_IDS + 3
    assert tokenizer.decode(tokenizer.encode("any text \u65e5")) == "any text \u65e5"
    assert len(build("char", tmp_path).encode("Tom has")) == 7


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_vocabulary_without_all_bytes_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"at least {MIN_IDS}"):
        build(name, tmp_path, vocab_size=MIN_IDS - 1)


def test_no_text_is_an_error(data: DataConfig) -> None:
    for name in ("bpe", "char"):
        with pytest.raises(DataError, match="no text"):
            build_tokenizer(
                TokenizerConfig(name=name), vocab_size=300, texts=lambda: iter([]), data=data
            )


def test_training_text_is_bounded(tmp_path: Path) -> None:
    read = 0

    def texts():  # type: ignore[no-untyped-def]
        nonlocal read
        for _ in range(100):
            read += 1
            yield "abc " * 25_000

    build_tokenizer(
        TokenizerConfig(max_train_mb=1),
        vocab_size=300,
        texts=texts,
        data=DataConfig(cache_dir=tmp_path),
        fingerprint="x",
    )
    assert read <= 11


def test_file_tokenizer(trained: Tokenizer, tmp_path: Path, data: DataConfig) -> None:
    path = tmp_path / "mine.json"
    trained.save(path)
    config = TokenizerConfig(name="file", path=path)
    made = build_tokenizer(config, vocab_size=600, texts=lambda: iter([]), data=data)
    assert made.sha256 == trained.sha256
    with pytest.raises(ConfigError, match=f"{trained.n_vocab} or more"):
        build_tokenizer(config, vocab_size=100, texts=lambda: iter([]), data=data)


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_bad_tokenizer_files(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def lossy_tokenizers() -> dict[str, Backend]:
    lower = Backend(models.WordLevel({"<unk>": 0, "two": 1, "spaces": 2}, unk_token="<unk>"))
    lower.normalizer, lower.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return {"words": lower, "two ids": Backend(models.BPE({"a": 0, "b": 1}, []))}


@pytest.mark.parametrize("name", ["words", "two ids"])
def test_a_tokenizer_that_loses_text_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    lossy_tokenizers()[name].save(str(path))
    with pytest.raises(DataError, match=r"tokenizer\.json: this tokenizer loses text"):
        Tokenizer.load(path)


def test_a_sentencepiece_tokenizer_is_taken(tmp_path: Path) -> None:
    """Llama's kind: spaces are a character, a first one is added and taken away again."""
    space = "\u2581"
    vocab = {t: i for i, t in enumerate([*(f"<0x{b:02X}>" for b in range(256)), space, "T", "w"])}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(" Two  w")) == " Two  w"


def test_lone_surrogate_is_a_data_error(trained: Tokenizer) -> None:
    with pytest.raises(DataError, match="cannot be encoded"):
        trained.encode("\ud800")


def test_gpt2_from_local_files(real_data: DataConfig) -> None:
    config = TokenizerConfig(name="gpt2")
    made = build_tokenizer(config, vocab_size=50304, texts=lambda: iter([]), data=real_data)
    assert made.n_vocab == 50262
    assert made.encode("Hello world") == [15496, 995]  # as OpenAI's encoder gives
    assert made.bos_id == 50257
    typed = "<|endoftext|> <|eos|> caf\u00e9\n"
    assert made.decode(made.encode(typed)) == typed
    assert 50256 not in made.encode(typed)


def test_gpt2_from_the_hub_is_asked_for_once(
    data: DataConfig, real_data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = TokenizerConfig(name="gpt2"), []
    sizes = {"vocab_size": 50304, "texts": lambda: iter([])}
    local = build_tokenizer(config, data=real_data, **sizes)

    class Hub:
        @staticmethod
        def from_pretrained(name: str, *, revision: str) -> Any:
            asked.append((name, revision))
            return Backend.from_str(local.to_json())

    monkeypatch.setattr("modern_llm.data.tokenizer.Backend", Hub)
    with (
        making(Making(build=False)),
        pytest.raises(DataError, match=r"'gpt2': not prepared \(.*gpt2-607a.*\.json is not there"),
    ):
        build_tokenizer(config, data=data, **sizes)
    Hub.from_file = Backend.from_file  # type: ignore[attr-defined]
    first, second = (build_tokenizer(config, data=data, **sizes) for _ in range(2))
    assert first.sha256 == second.sha256 == local.sha256
    assert len(asked) == 1 and len(asked[0][1]) == 40


def test_another_process_gets_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "typed <|eos|> caf\u00e9 42"
    assert copy.sha256 == tokenizer.sha256 and copy.encode(text) == tokenizer.encode(text)
    assert copy.eos_id not in copy.encode(text)


def test_gpt2_neither_local_nor_hub(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        @staticmethod
        def from_pretrained(*args: object, **kwargs: object) -> None:
            raise OSError("no route")

    monkeypatch.setattr("modern_llm.data.tokenizer.Backend", Unreachable)
    with pytest.raises(DataError, match=r"gpt2_bpe/ below MODERN_LLM_DATA.*hub"):
        build_tokenizer(
            TokenizerConfig(name="gpt2"), vocab_size=50304, texts=lambda: iter([]), data=data
        )
