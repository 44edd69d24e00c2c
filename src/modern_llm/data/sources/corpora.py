"""Named text corpora: WikiText, TinyStories, Tiny Shakespeare."""

import re
from collections.abc import Iterator
from pathlib import Path

from modern_llm.config import DataConfig
from modern_llm.data.lookup import open_text
from modern_llm.data.sources.base import SOURCES, RowCounts
from modern_llm.data.sources.files import Located
from modern_llm.data.sources.hub import HubSet
from modern_llm.data.sources.named import NamedSource
from modern_llm.errors import DataError

WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
TINYSTORIES_REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
STORY_BEGINS = re.compile(r"(Once upon a time|One day)\b")
SHAKESPEARE_TRAIN = 0.9  # by position, as in the usual comparisons on this text


def wikitext_pages(lines: Iterator[str]) -> Iterator[str]:
    """Whole pages of WikiText, text unchanged; one begins at each heading `` = Title = ``.

    Pages are what lm-evaluation-harness scores (``EleutherAI/wikitext_document_level``): lines
    joined by newlines, the blank lines before the next heading included, so that the words of a
    page count as they do there.
    """
    page: list[str] = []
    raw = ""
    for raw in lines:
        line = raw.removesuffix("\n")
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            if (text := "\n".join(page)).strip():
                yield text
            page = []
        page.append(line)
    if raw.endswith("\n"):
        page.append("")  # the text after the last newline, as splitting the whole file gives it
    if (text := "\n".join(page)).strip():
        yield text


class _WikiText(NamedSource):
    kind = "text"
    folder: str
    suffix: str

    def files(self, stored: str) -> list[tuple[str, ...]]:
        """``wiki.train.tokens`` or ``.raw`` and so on, in the set's folder."""
        part = "valid" if stored == "validation" else stored
        return [(f"{self.folder}/wiki.{part}.{self.suffix}",)]

    def read(self, path: Path, stored: str, counts: RowCounts) -> Iterator[Located]:
        """Pages of a local file."""
        with open_text(path) as file:
            for number, page in enumerate(wikitext_pages(iter(file)), start=1):
                yield f"{path}: page {number}", {"text": page}

    def from_hub(self, rows: Iterator[Located], stored: str) -> Iterator[Located]:
        """Pages from the hub's rows, which are lines: an empty row is an empty line."""
        lines = (raw["text"] or " \n" for _, raw in rows)
        for number, page in enumerate(wikitext_pages(lines), start=1):
            yield f"{self.hub[0].address} {stored} page {number}", {"text": page}


@SOURCES.register("wikitext2")
class WikiText2(_WikiText):
    """WikiText-2 v1 (rare words are ``<unk>``), one page a row; arXiv:1609.07843.

    Args:
        data: data root and cache folder.
        revision: commit, branch or tag on the hub; default: a pinned commit.
    """

    name, folder, suffix = "wikitext2", "wikitext2", "tokens"
    hub = (HubSet("Salesforce/wikitext", WIKITEXT_REVISION, config="wikitext-2-v1"),)


@SOURCES.register("wikitext2-raw")
class WikiText2Raw(_WikiText):
    """WikiText-2 raw (no ``<unk>``), one page a row; options as for `WikiText2`."""

    name, folder, suffix = "wikitext2-raw", "wikitext2", "raw"
    hub = (HubSet("Salesforce/wikitext", WIKITEXT_REVISION, config="wikitext-2-raw-v1"),)


@SOURCES.register("wikitext103")
class WikiText103(_WikiText):
    """WikiText-103 raw, one page a row; options as for `WikiText2`."""

    name, folder, suffix = "wikitext103", "wikitext103", "raw"
    hub = (HubSet("Salesforce/wikitext", WIKITEXT_REVISION, config="wikitext-103-raw-v1"),)


@SOURCES.register("tinystories")
class TinyStories(NamedSource):
    """TinyStories (arXiv:2305.07759), one story a row; no test split.

    Local files without a marker between stories are cut where a paragraph begins with "Once upon
    a time" or "One day".

    Args:
        data: data root and cache folder.
        revision: commit, branch or tag on the hub; default: a pinned commit.
    """

    name, kind = "tinystories", "text"
    hub = (
        HubSet(
            "roneneldan/TinyStories",
            TINYSTORIES_REVISION,
            splits={"train": "train", "validation": "validation"},
        ),
    )

    def files(self, stored: str) -> list[tuple[str, ...]]:
        """The whole split if it is there, else its head."""
        part = "valid" if stored == "validation" else stored
        whole = f"tinystories/TinyStories-{part}.txt"
        return [(whole, f"tinystories/{part}.txt", f"tinystories/{part}_head.txt")]

    def stored(self, split: str) -> tuple[str, dict[str, float]]:
        """As named; there is no test split."""
        if split == "test":
            raise DataError("tinystories has no test split; use its validation split")
        return split, {}

    def read(self, path: Path, stored: str, counts: RowCounts) -> Iterator[Located]:
        """Stories of a local file, cut at ``<|endoftext|>`` and at openings."""
        story: list[str] = []
        number = 0
        with open_text(path) as file:
            for line in file:
                marker = line.strip() == "<|endoftext|>"
                if (marker or STORY_BEGINS.match(line)) and "".join(story).strip():
                    number += 1
                    yield f"{path}: story {number}", {"text": "".join(story).strip()}
                    story = []
                if not marker:
                    story.append(line)
        if "".join(story).strip():
            yield f"{path}: story {number + 1}", {"text": "".join(story).strip()}


@SOURCES.register("tinyshakespeare")
class TinyShakespeare(NamedSource):
    """Tiny Shakespeare: the first 90 % to train on, the last 10 % to validate; local only.

    Args:
        data: data root and cache folder.
    """

    name, kind = "tinyshakespeare", "text"

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)

    def files(self, stored: str) -> list[tuple[str, ...]]:
        """One file for both splits."""
        return [("tinyshakespeare/input.txt",)]

    def stored(self, split: str) -> tuple[str, dict[str, float]]:
        """As named; there is no test split."""
        if split == "test":
            raise DataError("tinyshakespeare has no test split; use its validation split")
        if not self.local(split):
            raise DataError(
                "tinyshakespeare: put input.txt into tinyshakespeare/ below MODERN_LLM_DATA "
                "(or data.root), or name any text with the source 'text' and its option path"
            )
        return split, {}

    def read(self, path: Path, stored: str, counts: RowCounts) -> Iterator[Located]:
        """The split's part of the text, as one document."""
        with open_text(path) as file:
            text = file.read()
        cut = int(len(text) * SHAKESPEARE_TRAIN)
        yield str(path), {"text": text[:cut] if stored == "train" else text[cut:]}
