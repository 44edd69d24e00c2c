"""The one door to ``tokenizers``: byte-level BPE, characters, GPT-2's BPE, any ``tokenizer.json``.

Special tokens are added as ids by `templates`, never by matching text: what a user types stays
text, also when it reads ``<|eos|>``.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from modern_llm.config import DataConfig, TokenizerConfig
from modern_llm.data.lookup import ROOT_VARIABLE, find_local
from modern_llm.data.making import current
from modern_llm.errors import ConfigError, DataError, ModernLLMError
from modern_llm.runtime.artifacts import sha256_json, write_text

BOS, EOS, PAD, USER, ASSISTANT = SPECIALS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
)
MIN_IDS = 256 + len(SPECIALS)  # every byte, so that any text can be written
GPT2_REPOSITORY = "openai-community/gpt2"
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
PROBE = " Two  Spaces,\n\tCaf\u00e9 \u65e5 \U0001f642 40%"  # a tokenizer must give it back
TRAIN_PIECE_CHARS = 1 << 16  # bounds what training holds of one long document


class Tokenizer:
    """Text to ids and back. Every text comes back as it was; only `templates` adds special ids.

    Args:
        backend: a ``tokenizers.Tokenizer``; the five special tokens are added where missing.
    """

    def __init__(self, backend: Backend) -> None:
        backend.add_special_tokens(
            [AddedToken(s, special=True, normalized=False) for s in SPECIALS]
        )
        backend.encode_special_tokens = True  # typed special strings stay text
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.n_vocab: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        ids: list[int] = [backend.token_to_id(s) for s in SPECIALS]  # type: ignore[misc]
        self.bos_id, self.eos_id, self.pad_id, self.user_id, self.assistant_id = ids
        self.special_ids = frozenset(ids)
        self.sha256 = hashlib.sha256(self.to_json().encode()).hexdigest()

    def __reduce__(self) -> tuple[Callable[[str], "Tokenizer"], tuple[str]]:
        """Another process gets it as the content of ``tokenizer.json``."""
        return _from_json, (self.to_json(),)

    @property
    def kind(self) -> str:
        """How it cuts text: ``characters``, or the library's name of its model, such as ``BPE``."""
        model: dict[str, Any] = json.loads(self.to_json())["model"]
        return "characters" if model.get("merges") == [] else str(model["type"])

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; never a special id.

        Raises:
            DataError: the text is not valid Unicode (a lone surrogate).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them; on several threads when there are many."""
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"text cannot be encoded: {error}") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; ids that the tokenizer does not have are left out.

        Bytes that do not form a character (a cut in the middle) become U+FFFD.
        """
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token(self, token_id: int) -> str:
        """How one id is written, special or not, for audits; bytes are in the BPE's alphabet."""
        return self.backend.id_to_token(token_id) or f"<{token_id}>"

    def to_json(self) -> str:
        """Content of ``tokenizer.json``, special tokens included."""
        text: str = self.backend.to_str(pretty=False)
        return text

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json``; a file that exists is left as it is.

        Raises:
            DataError: another tokenizer is stored under this name.
        """
        if write_text(path, self.to_json(), on_exists="skip") is None:
            stored = path.read_text(encoding="utf-8")
            if stored != self.to_json():
                raise DataError(f"{path} holds another tokenizer; choose another name")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a ``tokenizer.json`` of this or another project.

        Raises:
            DataError: no such file, or not a tokenizer that can write any text.
        """
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer.json")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: not a tokenizer.json: {error}") from None
        tokenizer = cls(backend)
        if (back := tokenizer.decode(tokenizer.encode(PROBE))) != PROBE:
            raise DataError(
                f"{path}: this tokenizer loses text: {PROBE!r} comes back as {back!r}; use one "
                "that keeps case, spaces and all characters, such as a byte-level BPE"
            )
        return tokenizer


def _from_json(content: str) -> Tokenizer:
    return Tokenizer(Backend.from_str(content))


def build_tokenizer(
    config: TokenizerConfig,
    *,
    vocab_size: int,
    texts: Callable[[], Iterator[str]],
    data: DataConfig,
    fingerprint: str | None = None,
) -> Tokenizer:
    """The tokenizer that ``config`` asks for, trained where that is needed, and cached.

    Args:
        config: name and, for ``file``, the path.
        vocab_size: ids that the model has; the tokenizer has at most as many.
        texts: gives the training texts anew; read up to ``config.max_train_mb``.
        data: data root (GPT-2's files) and cache folder.
        fingerprint: hash of what ``texts`` gives, so that a cached tokenizer is found without
            reading them; without it the texts are hashed.

    Raises:
        ConfigError: the tokenizer has more ids than the model.
        DataError: files are missing, or there is no text to train on.
    """
    if config.name == "file":
        assert config.path is not None  # the schema demands it
        tokenizer = Tokenizer.load(config.path)
    elif config.name == "gpt2":
        tokenizer = _gpt2(data)
    else:
        if vocab_size < MIN_IDS:
            raise ConfigError(
                f"model.vocab_size={vocab_size}: tokenizer '{config.name}' needs at least "
                f"{MIN_IDS} (256 bytes and {len(SPECIALS)} special tokens)"
            )
        limit = config.max_train_mb * 1_000_000
        content = fingerprint or _hash_texts(_pieces(texts(), limit))
        key = sha256_json(
            {"name": config.name, "vocab_size": vocab_size, "texts": content, "max_bytes": limit}
        )
        path = data.cache_dir / "tokenizers" / f"{config.name}-{key[:24]}.json"
        if not path.is_file():
            _check_may_make(config.name, path)
            train = _train_bpe if config.name == "bpe" else _train_char
            write_text(path, train(_pieces(texts(), limit), vocab_size).to_json(), on_exists="skip")
        tokenizer = Tokenizer.load(path)
    if tokenizer.n_vocab > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: tokenizer '{config.name}' has {tokenizer.n_vocab} "
            f"ids; set model.vocab_size to {tokenizer.n_vocab} or more"
        )
    return tokenizer


def _pieces(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    """The texts in pieces of bounded length, up to ``limit_bytes`` of UTF-8."""
    seen = 0
    for text in texts:
        for start in range(0, len(text), TRAIN_PIECE_CHARS):
            piece = text[start : start + TRAIN_PIECE_CHARS]
            seen += len(piece.encode())
            yield piece
            if seen >= limit_bytes:
                return


def _hash_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _not_empty(texts: Iterator[str]) -> Iterator[str]:
    first = next(texts, None)
    if first is None:
        raise DataError("no text to train the tokenizer on; the training split is empty")
    return itertools.chain([first], texts)


def _train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; digits stand alone, so that numbers are spelt the same everywhere."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_not_empty(texts), trainer)
    return Tokenizer(backend)


def _train_char(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """One id a character, the most frequent first; other characters fall back to their bytes."""
    counts: Counter[str] = Counter()
    for text in _not_empty(texts):
        counts.update(text)
    by_count = sorted(counts, key=lambda char: (-counts[char], char))
    chars = sorted(by_count[: vocab_size - MIN_IDS])
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *chars]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    # Without merges pieces change no id; short ones are five times as fast as a whole text.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend)


def _check_may_make(name: str, path: Path) -> None:
    if not current().build:
        raise DataError(f"tokenizer '{name}': not prepared ({path} is not there)")


def _gpt2(data: DataConfig) -> Tokenizer:
    """GPT-2's BPE (50257 ids, then the special tokens) from the data root, else from the hub."""
    vocab = find_local(data, "gpt2_bpe/encoder.json")
    merges = find_local(data, "gpt2_bpe/vocab.bpe")
    copy = data.cache_dir / "tokenizers" / f"gpt2-{GPT2_REVISION[:24]}.json"
    try:
        if vocab is None or merges is None:
            if not copy.is_file():
                _check_may_make("gpt2", copy)
                found = Backend.from_pretrained(GPT2_REPOSITORY, revision=GPT2_REVISION)
                write_text(copy, Tokenizer(found).to_json(), on_exists="skip")
            return Tokenizer.load(copy)
        backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    except ModernLLMError:
        raise
    except Exception as error:  # the library raises plain Exception, for files and network alike
        raise DataError(
            f"tokenizer 'gpt2': {type(error).__name__}: {error}; put encoder.json and vocab.bpe "
            f"into gpt2_bpe/ below {ROOT_VARIABLE}, or let this machine reach the hub "
            f"({GPT2_REPOSITORY})"
        ) from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)
