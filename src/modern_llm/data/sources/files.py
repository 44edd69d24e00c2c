"""Rows of files: JSON, JSON lines, Parquet and plain text, gzipped or not."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modern_llm.config import DataConfig
from modern_llm.data.lookup import content_hash, open_text
from modern_llm.data.sources.base import (
    HASHED_SHARES,
    KINDS,
    SOURCES,
    DropRow,
    Malformed,
    RowCounts,
    Source,
    check_first_row,
    check_split,
    checked_row,
    hashed_split,
    text_field,
)
from modern_llm.data.templates import alpaca_prompt, prompt_text
from modern_llm.errors import ConfigError, DataError
from modern_llm.runtime.artifacts import sha256_json

Located = tuple[str, Any]  # "file:line" and the raw row
FORMAT = 2  # raised when the same file gives other rows
PIECE_CHARS = 1 << 18  # of a long text at most; cut at an empty line from a quarter of that on
MIN_PIECE_CHARS = 1 << 8
PIECES = 200  # at least of a text that is split by hash, so that each split has some


def json_lines(path: Path, counts: RowCounts) -> Iterator[Located]:
    """Objects of a ``.jsonl`` file; empty lines are skipped, bad JSON is counted."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                counts.malformed(f"not JSON: {error}", where)


def json_list(path: Path, counts: RowCounts) -> Iterator[Located]:
    """Entries of a ``.json`` file that holds one list.

    Raises:
        DataError: not JSON, or not a list.
    """
    with open_text(path) as file:
        try:
            rows = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}, not a list of rows")
    for number, row in enumerate(rows, start=1):
        yield f"{path}: entry {number}", row


def parquet_rows(path: Path, counts: RowCounts) -> Iterator[Located]:
    """Rows of a Parquet file, a batch in memory at a time.

    Raises:
        DataError: not a Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from None


READERS = {".jsonl": json_lines, ".json": json_list, ".parquet": parquet_rows}


def read_rows(path: Path, counts: RowCounts) -> Iterator[Located]:
    """Raw rows of a file by its ending, ``.gz`` left out.

    Raises:
        DataError: another kind of file.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in READERS:
        raise DataError(f"{path}: rows are read from {', '.join(READERS)} (or gzipped)")
    return READERS[suffix](path, counts)


def text_pieces(path: Path, separator: str | None = None, *, pieces: int = 0) -> Iterator[str]:
    """A text in pieces, in bounded memory; joined, and with the separators, they are the file.

    Args:
        path: UTF-8 text, gzipped or not.
        separator: a line that ends a document, and is left out; a document is cut only when it is
            very long. ``None``: a piece has at most `PIECE_CHARS` characters and ends at an empty
            line if there is one in the last three quarters of that.
        pieces: wanted at least, without a separator; those of a small file are shorter then, down
            to `MIN_PIECE_CHARS`.
    """
    most = PIECE_CHARS if separator is None else 16 * PIECE_CHARS
    if separator is None and pieces:
        most = min(most, max(path.stat().st_size // pieces, MIN_PIECE_CHARS))
    least = most // 4 if separator is None else 0
    lines: list[str] = []
    size = 0
    with open_text(path) as file:
        while line := file.readline(min(PIECE_CHARS, most)):
            ends = line.strip() == (separator or "") and (separator is not None or size >= least)
            if not (ends and separator is not None):
                lines.append(line)
                size += len(line)
            if (ends or size >= most) and lines:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def converted(kind: str, raw: Any) -> dict[str, Any]:
    """A row of ``kind`` from a raw row that has its fields, or Alpaca's for "instruct".

    Raises:
        Malformed: a field is missing or not text.
        DropRow: a rule leaves the row out.
    """
    if not isinstance(raw, Mapping):
        raise Malformed(f"{type(raw).__name__} instead of an object with fields")
    if kind == "instruct" and "instruction" in raw:
        answer = "output" if "output" in raw or "response" not in raw else "response"
        given = text_field(raw, "input") if raw.get("input") is not None else ""
        prompt = alpaca_prompt(text_field(raw, "instruction"), given)
        return checked_row(kind, {"prompt": prompt, "answer": text_field(raw, answer)})
    return checked_row(kind, {name: text_field(raw, name) for name in KINDS[kind]})


def row_key(kind: str, row: Mapping[str, Any]) -> str:
    """What decides a row's split where it goes by hash: the prompt, the question or the text."""
    if kind in ("instruct", "pairs"):
        return prompt_text(row["prompt"]).strip()
    return str(row["question"] if kind == "problems" else row["text"]).strip()


class _PathSource(Source):
    """Files named in the config: one for training, others for what is held out, or a hash split."""

    way_out = "give more rows, or name a file of its own as "

    def __init__(
        self,
        data: DataConfig,
        name: str,
        kind: str,
        paths: Mapping[str, str | Path | None],
        options: Mapping[str, Any],
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"{name}: kind={kind!r}: use one of {', '.join(KINDS)}")
        self.kind, self.data, self.options = kind, data, dict(options)
        self.paths = {
            split: Path(path).expanduser() for split, path in paths.items() if path is not None
        }
        self.description = f"{name} {self.paths['train'].name}"
        # Splits without a file of their own are cut from the training file by hash.
        self.shares = {s: n for s, n in HASHED_SHARES.items() if s not in self.paths}

    def rows(self, split: str, counts: RowCounts | None = None) -> Iterator[dict[str, Any]]:
        """Rows of the split's own file, or of the training file by hash of prompt or text."""
        check_split(split)
        counts = counts or RowCounts(max_bad_rows=self.data.max_bad_rows)
        own = split in self.paths and split != "train"
        for where, raw in self._raw(self._path(split), counts):
            try:
                row = self._convert(raw)
            except DropRow as rule:
                counts.drop(str(rule))
            except Malformed as fault:
                counts.malformed(str(fault), where)
            else:
                if own or hashed_split(row_key(self.kind, row), self.shares) == split:
                    yield row

    def fingerprint(self, split: str = "train") -> str:
        """Hash of the file's content, the options and how splits are cut."""
        content = content_hash(self._path(check_split(split)), self.data)
        return sha256_json(["file", FORMAT, self.kind, content, split, self.shares, self.options])

    def check(self, split: str) -> None:
        """See `Source`."""
        path = self._path(check_split(split))
        limit, way_out = self.data.max_bad_rows, ""
        if split in self.shares:
            way_out = f": it is cut from this file by hash; {self.way_out}{split}_path"
        check_first_row(self, split, where=str(path), max_bad_rows=limit, way_out=way_out)

    def _path(self, split: str) -> Path:
        path = self.paths.get(split, self.paths["train"])
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        return path

    def _raw(self, path: Path, counts: RowCounts) -> Iterator[Located]:
        return read_rows(path, counts)

    def _convert(self, raw: Any) -> dict[str, Any]:
        return converted(self.kind, raw)


@SOURCES.register("jsonl", "json")
class JsonLinesSource(_PathSource):
    """Rows of ``.jsonl`` files (or ``.json`` with one list), gzipped or not.

    Args:
        data: limit of malformed rows, cache of hashes.
        path: rows to train on; also held-out ones, by hash, where no other file is named.
        validation_path: rows of the validation split.
        test_path: rows of the test split.
        kind: "text", "instruct", "pairs" or "problems".
        fields: field of the row -> field of the file, such as ``{"prompt": "question"}``.

    Raises:
        ConfigError: an unknown kind or field.
    """

    name = "jsonl"

    def __init__(
        self,
        data: DataConfig,
        *,
        path: str | Path,
        validation_path: str | Path | None = None,
        test_path: str | Path | None = None,
        kind: str = "text",
        fields: Mapping[str, str] | None = None,
    ) -> None:
        paths = {"train": path, "validation": validation_path, "test": test_path}
        self.fields = dict(fields or {})
        super().__init__(data, self.name, kind, paths, {"fields": self.fields})
        if unknown := set(self.fields) - set(KINDS[kind]):
            raise ConfigError(
                f"fields: no field {sorted(unknown)} in rows of kind '{kind}' "
                f"(there are: {', '.join(KINDS[kind])})"
            )

    def _convert(self, raw: Any) -> dict[str, Any]:
        if self.fields and isinstance(raw, Mapping):
            renamed = {to: raw[name] for to, name in self.fields.items() if name in raw}
            raw = {**raw, **renamed}
        return super()._convert(raw)


@SOURCES.register("parquet")
class ParquetSource(JsonLinesSource):
    """Rows of Parquet files; see `JsonLinesSource` for the options."""

    name = "parquet"


@SOURCES.register("text")
class TextSource(_PathSource):
    """Plain UTF-8 text files, gzipped or not, of any size.

    Args:
        data: cache of hashes.
        path: text to train on; also held-out pieces, by hash, where no other file is named.
        validation_path: text of the validation split.
        test_path: text of the test split.
        separator: a line that ends a document, such as ``<|endoftext|>``; without it a document is
            a piece of 64 K to 256 K characters that ends at an empty line where there is one, or
            about 1/200 of the text if that is less and held-out pieces are cut from it.
    """

    way_out = "give a longer text, name a separator of documents, or a file of its own as "

    def __init__(
        self,
        data: DataConfig,
        *,
        path: str | Path,
        validation_path: str | Path | None = None,
        test_path: str | Path | None = None,
        separator: str | None = None,
    ) -> None:
        self.separator = separator
        paths = {"train": path, "validation": validation_path, "test": test_path}
        super().__init__(data, "text", "text", paths, {"separator": separator})

    def _raw(self, path: Path, counts: RowCounts) -> Iterator[Located]:
        pieces = PIECES if self.shares else 0
        for number, text in enumerate(text_pieces(path, self.separator, pieces=pieces), start=1):
            yield f"{path}: piece {number}", {"text": text}
