import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from modern_llm.config import DataConfig, SourceConfig
from modern_llm.data.sources import SPLITS, RowCounts, Source, hub, open_source
from modern_llm.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Stands in for ``datasets``: remembers what was asked for."""

    def __init__(self) -> None:
        self.tables: dict[str, list[Any]] = {}
        self.calls: list[dict[str, Any]] = []

    def load_dataset(self, repository: str, config: str | None, **options: Any) -> list[Any]:
        self.calls.append({"repository": repository, "config": config, **options})
        if repository not in self.tables:
            raise ConnectionError("no route to host\nmore lines")
        return self.tables[repository]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub()
    module = types.ModuleType("datasets")
    module.load_dataset = found.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub, "stay_offline_if_unreachable", lambda: None)
    return found


def make(data: DataConfig, name: str, **options: Any) -> Source:
    return open_source(SourceConfig(name=name, options=options), data)


EXPECTED = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-v1"),
    "wikitext2-raw": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "tinystories": ("roneneldan/TinyStories", None),
    "alpaca": ("tatsu-lab/alpaca", None),
    "hh-rlhf": ("Anthropic/hh-rlhf", None),
    "gsm8k": ("openai/gsm8k", "main"),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_hub_is_asked_for_a_pinned_commit_and_failure_says_both_ways(
    data: DataConfig, fake: FakeHub, name: str
) -> None:
    with pytest.raises(DataError) as caught:
        list(make(data, name).rows("train"))
    (call,) = fake.calls
    assert (call["repository"], call["config"]) == EXPECTED[name]
    assert call["split"] == "train"
    assert len(call["revision"]) == 40 and set(call["revision"]) <= set("0123456789abcdef")
    message = str(caught.value)
    assert (
        "MODERN_LLM_DATA" in message and "reach the hub" in message and call["revision"] in message
    )
    assert "ConnectionError: no route to host" in message and "more lines" not in message


def test_wikitext_lines_become_pages(data: DataConfig, fake: FakeHub) -> None:
    lines = ["", " = A = \n", "", " text \n", " = = B = = \n", "", " = C = \n", " more \n"]
    fake.tables["Salesforce/wikitext"] = [{"text": line} for line in lines]
    pages = [row["text"] for row in make(data, "wikitext103").rows("test")]
    assert pages == [" = A = \n \n text \n = = B = = \n ", " = C = \n more \n"]


def test_gsm8k_validation_comes_from_train(data: DataConfig, fake: FakeHub) -> None:
    fake.tables["openai/gsm8k"] = [{"question": f"q{i}", "answer": "#### 1"} for i in range(400)]
    source = make(data, "gsm8k")
    train, validation, test = ([r["question"] for r in source.rows(s)] for s in SPLITS)
    assert [call["split"] for call in fake.calls] == ["train", "train", "test"]
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == len(test) == 400


def test_hh_reads_each_subset(data: DataConfig, fake: FakeHub) -> None:
    row = {f: f"\n\nHuman: a\n\nAssistant: {f}" for f in ("chosen", "rejected")}
    fake.tables["Anthropic/hh-rlhf"] = [row]
    source = make(data, "hh-rlhf", subsets=["helpful-base", "harmless-base"])
    assert len(list(source.rows("test"))) == 2
    assert [c["data_dir"] for c in fake.calls] == ["helpful-base", "harmless-base"]


def test_malformed_hub_rows_name_the_row(data: DataConfig, fake: FakeHub) -> None:
    good = {"instruction": "x", "input": "", "output": "y"}
    fake.tables["tatsu-lab/alpaca"] = [good, {"instruction": "x"}]
    source = make(data, "alpaca")
    counts = RowCounts(max_bad_rows=0)
    with pytest.raises(
        DataError, match=r"tatsu-lab/alpaca@[0-9a-f]{40} train row 2: no field 'output'"
    ):
        list(source.rows("train", counts))


def test_revision_is_resolved_and_in_the_fingerprint(
    data: DataConfig, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("huggingface_hub")

    class Api:
        def dataset_info(self, repository: str, revision: str) -> Any:
            if revision == "gone":
                raise OSError("404")
            return types.SimpleNamespace(sha=COMMIT)

    module.HfApi = Api  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    fake.tables["openai/gsm8k"] = [{"question": "q", "answer": "#### 1"}]
    branch, commit = (make(data, "gsm8k", revision=r) for r in ("main", COMMIT))
    assert len(list(branch.rows("test"))) == 1
    assert fake.calls[-1]["revision"] == COMMIT
    assert branch.fingerprint() == commit.fingerprint() != make(data, "gsm8k").fingerprint()
    with pytest.raises(DataError, match="revision 'gone' cannot be resolved"):
        list(make(data, "gsm8k", revision="gone").rows("test"))


def test_a_split_that_the_hub_does_not_have(data: DataConfig, fake: FakeHub) -> None:
    with pytest.raises(DataError, match="no test split"):
        list(make(data, "tinystories").rows("test"))
    assert fake.calls == []


@pytest.mark.parametrize("proxy", [False, True])
def test_unreachable_hub_is_not_asked_again_and_again(proxy: bool) -> None:
    script = (
        "import os, socket\n"
        "def refuse(*args): raise OSError('down')\n"
        "socket.create_connection = refuse\n"
        "from modern_llm.data.sources import hub\n"
        "hub.stay_offline_if_unreachable()\n"
        "print(os.environ.get('HF_HUB_OFFLINE'))\n"
    )
    environment = {"PATH": "/usr/bin"} | ({"https_proxy": "http://proxy:1"} if proxy else {})
    out = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == ("None" if proxy else "1")


# ---- copies for machines without a network


def test_a_copy_is_read_in_place_of_the_hub(data: DataConfig, fake: FakeHub) -> None:
    fake.tables["openai/gsm8k"] = [{"question": f"q{i}", "answer": "#### 1"} for i in range(40)]
    source = make(data, "gsm8k")
    before = [list(source.rows(split)) for split in SPLITS]
    print_before = source.fingerprint()
    for split in SPLITS:
        source.fetch(split)
    fake.calls.clear()
    del fake.tables["openai/gsm8k"]
    for split in SPLITS:
        source.fetch(split)
        source.check(split)
    assert [list(source.rows(split)) for split in SPLITS] == before
    assert source.fingerprint() == print_before and fake.calls == []
    assert len(list((data.cache_dir / "hub").iterdir())) == 2  # train serves validation too


def test_a_copy_that_fails_half_way_leaves_nothing(data: DataConfig, fake: FakeHub) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"question": "q", "answer": "#### 1"}
        raise ConnectionError("the line is cut")

    fake.tables["openai/gsm8k"] = rows()  # type: ignore[assignment]
    with pytest.raises(DataError, match="ConnectionError: the line is cut"):
        make(data, "gsm8k").fetch("train")
    assert list((data.cache_dir / "hub").iterdir()) == []


def test_another_process_may_copy_the_same_set_first(
    data: DataConfig, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.tables["openai/gsm8k"] = [{"question": "q", "answer": "#### 1"}]
    first, second = make(data, "gsm8k"), make(data, "gsm8k")
    load = fake.load_dataset

    def slow(*arguments: Any, **options: Any) -> list[Any]:
        monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load)
        first.fetch("test")  # while the second one loads
        return load(*arguments, **options)

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", slow)
    second.fetch("test")
    (copy,) = (data.cache_dir / "hub").iterdir()
    assert sorted(p.name for p in copy.iterdir()) == ["manifest.json", "rows.jsonl"]
    assert len(list(second.rows("test"))) == 1


def test_a_row_that_was_altered_is_named(data: DataConfig, fake: FakeHub) -> None:
    fake.tables["openai/gsm8k"] = [{"question": "q", "answer": "#### 1"}] * 2
    source = make(data, "gsm8k")
    source.fetch("test")
    (path,) = (data.cache_dir / "hub").glob("*/rows.jsonl")
    path.write_bytes(path.read_bytes().replace(b'{"question"', b'("question"'))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not what was written; run 'modern-llm"):
        list(source.rows("test"))
