"""What prepare-data makes is all that a run needs: no network, nothing encoded twice."""

import json
import os
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modern_llm.cli import main
from modern_llm.config import DataConfig, SourceConfig
from modern_llm.data.sources import hub, open_source

HUB = {  # the sources of the tiny config, on the hub
    "pretrain.data": ["tinystories"],
    "pretrain.max_validation_rows": 5,
    "sft.data": ["alpaca"],
    "dpo.data": [{"name": "hh-rlhf", "subsets": ["helpful-base"]}],
    "verifier.data": ["gsm8k"],
    "data.replay": 0.2,
    "eval.perplexity": [{"source": "wikitext2-raw", "max_texts": 2}],
    "eval.reasoning.source": "gsm8k",
    "eval.preference": {
        "source": {"name": "hh-rlhf", "subsets": ["helpful-base"]},
        "max_pairs": 8,
    },
}


def synthetic(kind: str, rows: int) -> Iterator[dict[str, Any]]:
    options = {"kind": kind, "rows": rows, "held_out_rows": 1}
    return open_source(SourceConfig(name="synthetic", options=options), DataConfig()).rows("train")


def tables() -> dict[str, list[dict[str, str]]]:
    """Rows of the five sets as the hub has them."""
    texts = [row["text"] for row in synthetic("text", 120)]
    pages = [line for i, t in enumerate(texts[:8]) for line in (f" = {i} = \n", "", f" {t} \n")]
    pairs = synthetic("pairs", 120)
    told = "\n\nHuman: {}\n\nAssistant: {}"
    return {
        "roneneldan/TinyStories": [{"text": text} for text in texts],
        "tatsu-lab/alpaca": [
            {"instruction": row["prompt"], "input": "", "output": row["answer"]}
            for row in synthetic("instruct", 240)
        ],
        "Anthropic/hh-rlhf": [
            {side: told.format(row["prompt"], row[side]) for side in ("chosen", "rejected")}
            for row in pairs
        ],
        "openai/gsm8k": list(synthetic("problems", 300)),
        "Salesforce/wikitext": [{"text": line} for line in pages],
    }


class Place:
    """A config whose data is on a hub that can be switched off."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config, self.asked = folder, config, list[str]()
        self.tables = tables()

    def load_dataset(self, repository: str, *_: Any, split: str, **options: Any) -> Any:
        self.asked.append(f"{repository} {split}")
        rows = self.tables[repository]
        return rows[1::2] if (repository, split) == ("openai/gsm8k", "test") else rows[::2]

    def prepare(self, *arguments: str) -> int:
        return main(["prepare-data", "--config", str(self.config), *arguments])

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def stores(self) -> dict[str, Path]:
        """What a store is of -> its folder."""
        found = self.cache.glob("stores/[0-9a-f]*/manifest.json")
        return {
            f"{m['key']['what']}, {len(m['sources'])} sources, {m['rows']} rows": path.parent
            for path in found
            if (m := json.loads(path.read_text()))
        }


@pytest.fixture
def place(
    tmp_path: Path, write_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Place:
    found = Place(tmp_path, write_tiny(tmp_path, HUB))
    module = types.ModuleType("datasets")
    module.load_dataset = found.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub, "stay_offline_if_unreachable", lambda: None)
    monkeypatch.delenv("MODERN_LLM_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    return found


@pytest.fixture
def no_network(tmp_path: Path) -> dict[str, str]:
    """Environment of a process in which the hub's libraries and sockets raise."""
    folder = tmp_path / "no-network"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import socket, sys

            def refuse(*arguments, **options):
                raise AssertionError(f"asked the network for {arguments}")

            socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
            sys.modules["datasets"] = sys.modules["huggingface_hub"] = None
        """)
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def test_a_run_on_prepared_data_asks_no_network_and_encodes_nothing(
    place: Place, cli: Callable[..., Any], no_network: dict[str, str]
) -> None:
    refused = cli("run", "--config", place.config, env=no_network)
    assert refused.returncode == 3 and "modern-llm prepare-data" in refused.stderr
    shutil.rmtree(place.cache, ignore_errors=True)
    assert place.prepare("--jobs", "2") == 0
    prepared, asked = place.stores(), len(place.asked)
    assert len(prepared) == 7  # train and validation of three stages, and pairs to evaluate on
    times = {path: path.stat().st_mtime_ns for f in prepared.values() for path in f.iterdir()}
    assert place.prepare() == 0 and place.stores() == prepared
    assert len(place.asked) == asked  # all copies were there
    assert times == {path: path.stat().st_mtime_ns for path in times}

    done = cli("run", "--config", place.config, "--no-report", env=no_network, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    added = set(place.stores()) - set(prepared)
    assert added and all(name.startswith("solutions") for name in added)  # the policy wrote them
    assert times == {path: path.stat().st_mtime_ns for path in times}
    for stage in ("pretrain", "sft", "dpo", "verifier", "eval"):
        assert (place.folder / "runs" / "tiny" / stage / "result.json").is_file()


def test_check_names_what_is_missing_and_the_command(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.prepare("--check") == 3
    told = capsys.readouterr().err
    for name in ("tinystories", "alpaca", "hh-rlhf (helpful-base)", "gsm8k", "wikitext2-raw"):
        assert f"source {name}, " in told
    assert "tokenizer bpe: " in told
    assert f"this fetches and makes it: modern-llm prepare-data --config {place.config}\n" in told
    assert not place.asked and not place.stores()
    assert place.prepare() == 0
    asked, stores = len(place.asked), place.stores()
    assert place.prepare("--check") == 0
    assert (len(place.asked), place.stores()) == (asked, stores)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip(path: Path) -> None:
    """Change one byte and leave size and time as they are."""
    state, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("pattern", "damage", "told"),
    [
        ("stores/*", remove, "tokens.*not prepared"),
        ("stores/*/tokens-00000.bin", cut, r"tokens-00000.bin: \d+ bytes, the manifest says \d+"),
        ("stores/*/offsets-00000.bin", flip, "offsets-00000.bin: its content is not what was"),
        ("hub/*", remove, r"source .*, .* split: .*not copied"),
        ("hub/*/rows.jsonl", cut, r"source .*rows.jsonl: \d+ bytes, the manifest says \d+"),
        ("hub/*/rows.jsonl", flip, "source .*rows.jsonl: its content is not"),
        ("tokenizers/*.json", remove, "tokenizer 'bpe': not prepared"),
    ],
)
def test_check_sees_every_damage_and_preparing_again_mends_it(
    place: Place, pattern: str, damage: Callable[[Path], None], told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert place.prepare("--jobs", "1") == 0
    for path in sorted(place.cache.glob(pattern)):
        capsys.readouterr()
        damage(path)
        assert place.prepare("--check") == 3
        error = capsys.readouterr().err.partition("error: ")[2]
        assert re.search(told, error), error
        assert place.prepare("--jobs", "1") == 0
        assert place.prepare("--check") == 0


def test_a_run_refuses_a_half_copied_shard(
    place: Place, cli: Callable[..., Any], no_network: dict[str, str]
) -> None:
    assert place.prepare("--stage", "pretrain") == 0
    (tokens,) = (
        folder / "tokens-00000.bin" for what, folder in place.stores().items() if "train" in what
    )
    cut(tokens)
    done = cli("run", "--stage", "pretrain", "--config", place.config, env=no_network)
    assert done.returncode == 3
    assert f"error: {tokens}: " in done.stderr and "Traceback" not in done.stderr
    assert "run 'modern-llm prepare-data' with this config" in done.stderr


def test_what_cannot_be_had_does_not_keep_the_rest(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    del place.tables["openai/gsm8k"]
    assert place.prepare() == 3
    told = capsys.readouterr().err.partition("error: ")[2]
    assert "source gsm8k, train split: openai/gsm8k" in told and "alpaca" not in told
    assert len(place.stores()) == 7


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--jobs", "2", "--check"]])
def test_jobs_that_make_no_sense(place: Place, arguments: list[str]) -> None:
    assert place.prepare(*arguments) == 2


def test_baselines_are_part_of_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("modern_llm.evaluation.baselines.hub_reachable", lambda: False)
    monkeypatch.setenv("HF_HOME", str(place.folder / "empty"))
    assert place.prepare("--stage", "eval", 'eval.baselines=["nobody/nothing"]') == 3
    assert "baseline nobody/nothing: the hub cannot be reached" in capsys.readouterr().err
