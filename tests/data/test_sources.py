import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import DataConfig, SourceConfig
from modern_llm.data.lookup import content_hash, data_root, find_local, open_text
from modern_llm.data.sources import KINDS, SOURCES, SPLITS, RowCounts, Source, open_source
from modern_llm.data.sources.corpora import wikitext_pages
from modern_llm.data.sources.files import text_pieces
from modern_llm.data.templates import Turn, prompt_text
from modern_llm.errors import ConfigError, DataError


def make(data: DataConfig, name: str, **options: Any) -> Source:
    return open_source(SourceConfig(name=name, options=options), data)


def keys(source: Source, split: str) -> list[str]:
    field = {"text": "text", "problems": "question"}.get(source.kind, "prompt")
    return [prompt_text(row[field]) for row in source.rows(split)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


# ---- every registered source, on real data


ROWS = {  # rows of train, validation and test in the copies that the tests know; None: not there
    "wikitext2": (629, 60, 62),
    "wikitext2-raw": (None, 60, 62),
    "tinystories": (837, 989, None),
    "tinyshakespeare": (1, 1, None),
    "gsm8k": (7081, 392, 1319),
    "hh-rlhf": (7651, 447, 390),
    "alpaca": (3717, 173, 209),
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_real_sets(real_data: DataConfig, name: str) -> None:
    source = make(real_data, name)
    seen: set[str] = set()
    for split, n in zip(SPLITS, ROWS[name], strict=True):
        if n is None:
            continue
        rows = list(source.rows(split))
        assert len(rows) == n
        assert all(set(row) == set(KINDS[source.kind]) for row in rows)
        prompts = set(keys(source, split))
        assert not prompts & seen  # no prompt in two splits
        seen |= prompts
    prints = [source.fingerprint(s) for s, n in zip(SPLITS, ROWS[name], strict=True) if n]
    assert len(set(prints)) == len(prints)


def test_real_hh_rows_dropped_by_rule(real_data: DataConfig) -> None:
    expected = {
        "harmless-base": (5, 4, 0),
        "helpful-base": (9, 4, 2),
        "helpful-online": (0, 3, 2),
        "helpful-rejection-sampled": (3, 0, 32),
    }
    for subset, (differ, empty, equal) in expected.items():
        counts = RowCounts()
        rows = list(make(real_data, "hh-rlhf", subsets=[subset]).rows("test", counts))
        reasons = ("prompts differ", "empty answer", "equal answers")
        assert tuple(counts.dropped.get(r, 0) for r in reasons) == (differ, empty, equal)
        for row in rows:
            assert isinstance(row["prompt"], str) or row["prompt"][-1].role == "user"


@pytest.mark.parametrize(("name", "file"), [("wikitext2", "tokens"), ("wikitext2-raw", "raw")])
def test_real_wikitext_pages_are_the_text(real_data: DataConfig, name: str, file: str) -> None:
    """Pages as lm-evaluation-harness has them, by a plain reading of the whole file."""
    assert real_data.root is not None
    whole = (real_data.root / "wikitext2" / f"wiki.test.{file}").read_text(encoding="utf-8")
    pages = [row["text"] for row in make(real_data, name).rows("test")]
    assert whole.endswith("\n".join(pages))
    assert whole.removesuffix("\n".join(pages)).strip() == ""
    assert all(re.match(r" = [^=].*[^=] = \n", page) for page in pages)
    words = sum(len(page.split()) for page in pages)
    assert words == len(whole.split()) == 241211
    # the harness divides by the pieces between runs of white space, empty ones at the ends too
    assert sum(len(re.split(r"\s+", page)) for page in pages) == words + 2 * len(pages)


def test_real_gsm8k_validation_is_cut_from_train(real_data: DataConfig) -> None:
    source = make(real_data, "gsm8k")
    assert len(set(keys(source, "train")) | set(keys(source, "validation"))) == 7473
    assert re.search(r"#### \d+$", next(source.rows("train"))["answer"])


def test_real_alpaca_files_by_name(real_data: DataConfig) -> None:
    files = [
        "gpteacher_roleplay.json",
        "instruct/self_instruct_seed_tasks.jsonl",
        "code_alpaca_2k.json",
    ]
    source = make(real_data, "alpaca", files=files)
    counts = RowCounts()
    total = sum(
        len(list(source.rows(split, counts if split == "test" else None))) for split in SPLITS
    )
    assert counts.dropped == {"empty answer": 2}  # of code_alpaca_2k
    assert total > 1923 + 175 + 2017 - 10
    assert "gpteacher_roleplay.json.gz" in source.description
    with pytest.raises(DataError, match=r"instruct/nothing\.json"):
        list(make(real_data, "alpaca", files=["nothing.json"]).rows("train"))


# ---- WikiText, TinyStories, HH, Alpaca in small


def test_wikitext_pages() -> None:
    text = " \n = A B = \n \n one = two \n = = Part = = \n x \n \n = C = \n y \n"
    pages = list(wikitext_pages(iter(text.splitlines(keepends=True))))
    assert pages == [" = A B = \n \n one = two \n = = Part = = \n x \n ", " = C = \n y \n"]


def test_stories_are_cut_at_openings_and_markers(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "tinystories").mkdir()
    text = "Once upon a time A.\n\nMore.\n\nOne day B.\nOne daylight.\n<|endoftext|>\nC.\n\n\n"
    (tmp_path / "tinystories" / "train.txt").write_text(text)
    source = make(data.model_copy(update={"root": tmp_path}), "tinystories")
    stories = ["Once upon a time A.\n\nMore.", "One day B.\nOne daylight.", "C."]
    assert keys(source, "train") == stories
    with pytest.raises(DataError, match="no test split"):
        list(source.rows("test"))


def hh(prompt: str, answer: str) -> str:
    return f"\n\nHuman: {prompt}\n\nAssistant: {answer}"


def test_hh_layouts_and_rules(data: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "hh-rlhf" / "helpful-base"
    folder.mkdir(parents=True)
    rows = [
        {"chosen": hh("a", "yes"), "rejected": hh("a", "no")},
        {"chosen": hh("a", "b") + hh("c", "yes"), "rejected": hh("a", "b") + hh("c", "no")},
        {"chosen": hh("a", "x"), "rejected": hh("b", "y")},
        {"chosen": hh("a", ""), "rejected": hh("a", "y")},
        {"chosen": hh("a", "y"), "rejected": hh("a", "y")},
        {"chosen": "\n\nAssistant: alone", "rejected": "\n\nAssistant: also"},
        {"chosen": 3, "rejected": ""},
    ]
    write_rows(folder / "train.jsonl.gz", rows)
    write_rows(folder / "test.jsonl", rows[:1])
    source = make(data.model_copy(update={"root": tmp_path}), "hh-rlhf", subsets=["helpful-base"])
    counts = RowCounts()
    kept = [*source.rows("train", counts), *source.rows("validation")]
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    assert sorted(kept, key=str) == sorted(
        [
            {"prompt": "a", "chosen": "yes", "rejected": "no"},
            {"prompt": turns, "chosen": "yes", "rejected": "no"},
        ],
        key=str,
    )
    assert counts.dropped == {
        "prompts differ": 1,
        "empty answer": 1,
        "equal answers": 1,
        "not a dialogue of turns": 1,
        "malformed": 1,
    }
    assert len(list(source.rows("test"))) == 1  # of its own file, not by hash
    with pytest.raises(ConfigError, match="choose from"):
        make(data, "hh-rlhf", subsets=["nice-base"])


def test_whole_alpaca_is_preferred(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "instruct").mkdir()
    rows = [{"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(300)]
    (tmp_path / "instruct" / "alpaca_data.json").write_text(json.dumps(rows))
    source = make(data.model_copy(update={"root": tmp_path}), "alpaca")
    sizes = [len(list(source.rows(split))) for split in SPLITS]
    assert sum(sizes) == 300 and 5 <= sizes[1] <= 30 and 5 <= sizes[2] <= 30
    assert source.description == "alpaca (alpaca_data.json)"


# ---- files by path


def test_jsonl_kinds_and_fields(data: DataConfig, tmp_path: Path) -> None:
    rows = [{"q": "1+1", "a": "#### 2"}, {"q": "2+2", "a": "#### 4"}]
    path = write_rows(tmp_path / "rows.jsonl.gz", rows)
    fields = {"question": "q", "answer": "a"}
    source = make(
        data, "jsonl", path=str(path), test_path=str(path), kind="problems", fields=fields
    )
    assert list(source.rows("test")) == [{"question": r["q"], "answer": r["a"]} for r in rows]
    other = make(data, "jsonl", path=str(path), kind="problems", fields=fields | {"answer": "q"})
    assert other.fingerprint() != source.fingerprint()
    with pytest.raises(ConfigError, match="no field"):
        make(data, "jsonl", path=str(path), fields={"prompt": "q"})
    with pytest.raises(ConfigError, match="kind='poem'"):
        make(data, "jsonl", path=str(path), kind="poem")
    with pytest.raises(ConfigError, match="missing path"):
        make(data, "jsonl")


def test_hash_splits_follow_the_prompt_not_the_row(data: DataConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 200}", "answer": f"a{i}"} for i in range(1000)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    shuffled = write_rows(tmp_path / "other.jsonl", rows[::-3] + rows[:10])
    source, other = (make(data, "jsonl", path=p, kind="instruct") for p in (path, shuffled))
    split_of = {prompt: split for split in SPLITS for prompt in keys(source, split)}
    assert len(split_of) == 200
    assert sum(len(keys(source, split)) for split in SPLITS) == 1000
    assert {"train", "validation", "test"} == set(split_of.values())
    assert all(split_of[p] == split for split in SPLITS for p in keys(other, split))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "list instead of an object"),
        ({"prompt": "x"}, "no field 'answer'"),
        ({"prompt": "x", "answer": 3}, "field 'answer' is int, not text"),
        ({"instruction": "x", "output": None}, "field 'output' is NoneType"),
        ('{"prompt": "x", "answer": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_malformed_rows(data: DataConfig, tmp_path: Path, row: Any, reason: str) -> None:
    good = {"prompt": "fine", "answer": "yes"}
    path = write_rows(tmp_path / "rows.jsonl", [good, row, "", good, row, row])
    source = make(data, "jsonl", path=path, test_path=path, kind="instruct")
    with pytest.raises(DataError, match=rf"rows\.jsonl:6: .*{reason}.*max_bad_rows=2"):
        list(source.rows("test"))
    patient = data.model_copy(update={"max_bad_rows": 3})
    counts = RowCounts(max_bad_rows=3)
    source = make(patient, "jsonl", path=path, test_path=path, kind="instruct")
    assert len(list(source.rows("test", counts))) == 2
    assert counts.dropped == {"malformed": 3}


def test_rules_count_but_do_not_limit(data: DataConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": " a"}] * 5
    rows += [{"prompt": "p", "chosen": "", "rejected": "a"}] * 5
    rows += [{"prompt": " ", "chosen": "b", "rejected": "a"}] * 5
    path = write_rows(tmp_path / "rows.jsonl", rows)
    counts = RowCounts()
    source = make(data, "jsonl", path=path, test_path=path, kind="pairs")
    assert list(source.rows("test", counts)) == []
    assert counts.dropped == {"equal answers": 5, "empty answer": 5, "empty prompt": 5}


def test_json_list_and_its_errors(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "  "}]))
    assert keys(make(data, "json", path=path, test_path=path), "test") == ["a"]
    for content, reason in [("{}", "not a list"), ("[", "not JSON")]:
        path.write_text(content)
        with pytest.raises(DataError, match=reason):
            list(make(data, "jsonl", path=path).rows("train"))


def test_parquet(data: DataConfig, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}" for i in range(3000)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": texts}), path)
    source = make(data, "parquet", path=path, test_path=path, fields={"text": "body"})
    assert keys(source, "test") == texts
    assert source.description == "parquet rows.parquet"
    path.write_bytes(b"PAR1 broken")
    with pytest.raises(DataError, match="Parquet"):
        list(source.rows("test"))


def test_text_documents(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n")
    whole = make(data, "text", path=path, test_path=path)
    assert keys(whole, "test") == [path.read_text()]
    cut = make(data, "text", path=path, test_path=path, separator="<|endoftext|>")
    assert keys(cut, "test") == ["one\n\ntwo\n", "\nthree\n"]
    assert cut.fingerprint() != whole.fingerprint()


@pytest.mark.parametrize("line", ["word " * 30 + "\n", "\n", "x" * 500_000 + "\n", "no end"])
def test_text_pieces_are_bounded_and_whole(tmp_path: Path, line: str) -> None:
    path = tmp_path / "big.txt"
    text = (line * 20 + "\n") * (3_000_000 // (20 * len(line) + 1) + 1)
    path.write_text(text)
    pieces = list(text_pieces(path))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 600_000
    assert len(pieces) < 70


def test_long_text_is_split_by_hash(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    path.write_text("".join(f"Paragraph {i} " + "word " * 300 + "\n\n" for i in range(4000)))
    source = make(data, "text", path=path)
    parts = [keys(source, split) for split in SPLITS]
    assert sum(map(len, map("".join, parts))) == path.stat().st_size
    assert all(parts)


PARAGRAPHS = "".join(
    f"Line {i} of a play, as {i * 7919} others have it,\nand its second line.\n\n"
    for i in range(550)
)
SHORT_TEXTS = {
    "paragraphs": PARAGRAPHS,
    "lines": PARAGRAPHS.replace("\n\n", "\n"),
    "one line": PARAGRAPHS.replace("\n", " "),
    "not ASCII": PARAGRAPHS.replace("e", "\u00e9"),
}


@pytest.mark.parametrize("name", sorted(SHORT_TEXTS))
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_short_text_has_every_split(
    data: DataConfig, tmp_path: Path, name: str, pack: Any
) -> None:
    text = SHORT_TEXTS[name]
    assert len(text) < 40_000
    for i in range(5):
        path = tmp_path / f"{i}.txt{'.gz' if pack is gzip.compress else ''}"
        path.write_bytes(pack(f"{i}. {text}".encode()))
        source = make(data, "text", path=path)
        parts = ["".join(keys(source, split)) for split in SPLITS]
        assert all(parts) and sum(map(len, parts)) == len(text) + 3
        assert len(parts[0]) > 0.75 * len(text)


def test_a_text_with_held_out_files_is_not_cut_short(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text(PARAGRAPHS)
    source = make(data, "text", path=path, validation_path=path, test_path=path)
    assert keys(source, "train") == [PARAGRAPHS]


@pytest.mark.parametrize(
    ("name", "ways_out"),
    [
        ("text", "give a longer text, name a separator of documents, or"),
        ("jsonl", "give more rows, or name"),
    ],
)
def test_a_split_that_is_empty_says_the_ways_out(
    data: DataConfig, tmp_path: Path, name: str, ways_out: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "the only one"}])
    told = rf"rows\.jsonl: no row for the validation split.*{ways_out}.* as validation_path"
    with pytest.raises(DataError, match=told):
        make(data, name, path=path).check("validation")


@pytest.mark.parametrize("answer", ["17 + 25 = 42", "It is so.\n#### ,", "#### x"])
def test_problems_say_their_result(data: DataConfig, tmp_path: Path, answer: str) -> None:
    rows = [{"question": "a", "answer": "#### 1"}, *[{"question": "b", "answer": answer}] * 3]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    source = make(data, "jsonl", path=path, test_path=path, kind="problems")
    with pytest.raises(DataError, match=r"rows\.jsonl:4: field 'answer' has no line '#### number'"):
        list(source.rows("test"))


def test_deep_json_is_not_json(data: DataConfig, tmp_path: Path) -> None:
    deep = "[" * 100_000
    path = write_rows(tmp_path / "rows.jsonl", [*[deep] * 3])
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not JSON"):
        list(make(data, "jsonl", path=path).rows("train"))
    (tmp_path / "rows.json").write_text(deep)
    with pytest.raises(DataError, match=r"rows\.json: not JSON"):
        list(make(data, "jsonl", path=tmp_path / "rows.json").rows("train"))


@pytest.mark.parametrize("name", ["jsonl", "text", "parquet"])
def test_missing_empty_and_unreadable_files(data: DataConfig, tmp_path: Path, name: str) -> None:
    missing = make(data, name, path=tmp_path / "nothing.jsonl")
    for attempt in (lambda: list(missing.rows("train")), missing.fingerprint):
        with pytest.raises(DataError, match=r"nothing\.jsonl"):
            attempt()
    if name != "parquet":
        damaged = tmp_path / "rows.jsonl.gz"
        damaged.write_bytes(gzip.compress(b'{"text": "abc"}\n' * 99)[:-20])
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be read"):
            list(make(data, name, path=damaged).rows("train"))
        altered = bytearray(gzip.compress(bytes(range(65, 91)) * 999))
        altered[10] ^= 0xFF  # the first byte of what is compressed
        damaged.write_bytes(altered)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be read"):
            list(make(data, name, path=damaged).rows("train"))
        (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9\n")
        with pytest.raises(DataError, match="not UTF-8"):
            list(make(data, name, path=tmp_path / "latin.jsonl").rows("train"))


def test_unknown_ending(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.parquet"):
        list(make(data, "jsonl", path=tmp_path / "rows.csv").rows("train"))


# ---- lookup


def test_unknown_source_and_option(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match="did you mean 'wikitext2'"):
        make(data, "wikitext-2")
    with pytest.raises(ConfigError, match="unknown option 'subset'; did you mean 'subsets'"):
        make(data, "hh-rlhf", subset="x")


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"jsonl", "text", "parquet", "synthetic"}))
def test_every_named_source_opens_without_reading(data: DataConfig, name: str) -> None:
    source = make(data, name)
    assert source.kind in KINDS and source.description.startswith(name)
    with pytest.raises(DataError, match="train, validation, test"):
        list(source.rows("dev"))


def test_root_from_the_environment(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data_root(data) is None and find_local(data, "a.txt") is None
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x"))
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    assert find_local(data, "b.txt", "a.txt") == tmp_path / "a.txt.gz"
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"MODERN_LLM_DATA=.*no such folder"):
        data_root(data)
    with pytest.raises(DataError, match=r"data\.root"):
        data_root(data.model_copy(update={"root": tmp_path / "gone"}))


def test_tinyshakespeare_says_the_ways_out(data: DataConfig) -> None:
    with pytest.raises(DataError, match=r"below MODERN_LLM_DATA.*source 'text'"):
        list(make(data, "tinyshakespeare").rows("train"))


def test_content_hash_is_remembered_and_follows_changes(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = content_hash(path, data)

    def refuse(path: Path) -> str:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patched:
        patched.setattr("modern_llm.data.lookup.sha256_file", refuse)
        assert content_hash(path, data) == first
    path.write_text("two")
    assert content_hash(path, data) != first


def test_line_ends_are_kept(tmp_path: Path) -> None:
    for name, pack in [("a.txt", bytes), ("a.txt.gz", gzip.compress)]:
        (tmp_path / name).write_bytes(pack(b"a\r\nb\rc\n"))
        with open_text(tmp_path / name) as file:
            assert file.read() == "a\r\nb\rc\n"
