"""Named instruction, preference and problem sets: Alpaca, HH-RLHF, GSM8K."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modern_llm.config import DataConfig
from modern_llm.data.lookup import find_local
from modern_llm.data.sources.base import (
    HASHED_SHARES,
    SOURCES,
    DropRow,
    Malformed,
    checked_row,
    text_field,
)
from modern_llm.data.sources.files import converted
from modern_llm.data.sources.hub import HubSet
from modern_llm.data.sources.named import NamedSource
from modern_llm.data.templates import HH_ASSISTANT, split_hh
from modern_llm.errors import ConfigError, DataError

ALPACA_REVISION = "dce01c9b08f87459cf36a430d809084718273017"
HH_REVISION = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
GSM8K_REVISION = "e53f048856ff4f594e959d75785d2c2d37b678ee"
ALPACA_FILES = ("alpaca_data.json",)
ALPACA_CUTS = (
    "alpaca_small.json",
    "llamafactory_alpaca_en_demo.json",
    "rasbt_instruction_data.json",
)
HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
VALIDATION_ONLY = {"validation": HASHED_SHARES["validation"]}


@SOURCES.register("alpaca")
class Alpaca(NamedSource):
    """Instructions with answers in Alpaca's format; splits by hash of the prompt.

    Args:
        data: data root and cache folder.
        files: names in ``instruct/`` (or paths) below the data root; default: the whole set
            (``alpaca_data.json``) if it is there, else the small Alpaca-format sets.
        revision: commit, branch or tag of ``tatsu-lab/alpaca``; default: a pinned commit.
    """

    name, kind = "alpaca", "instruct"
    hub = (HubSet("tatsu-lab/alpaca", ALPACA_REVISION, splits={"train": "train"}),)

    def __init__(
        self,
        data: DataConfig,
        *,
        files: Sequence[str] | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(data, revision=revision)
        self.chosen = None if files is None else tuple(files)
        if local := self.local("train"):
            self.description = f"alpaca ({', '.join(path.name for path in local)})"

    def files(self, stored: str) -> list[tuple[str, ...]]:
        """The chosen files, or the default ones."""
        names = self.chosen
        if names is None:
            whole = [_in_folder("instruct", name) for name in ALPACA_FILES]
            if all(self._found(choice) for choice in whole):
                return whole
            names = ALPACA_CUTS
        return [_in_folder("instruct", name) for name in names]

    def stored(self, split: str) -> tuple[str, dict[str, float]]:
        """All splits are cut from the one that is stored."""
        if self.chosen is not None:
            for choice in self.files("train"):
                if not self._found(choice):
                    raise DataError(f"alpaca: no {choice[0]} below MODERN_LLM_DATA or data.root")
        return "train", HASHED_SHARES

    def convert(self, raw: Any) -> Iterator[dict[str, Any]]:
        """Alpaca's fields, GPTeacher's ``response``, or Self-Instruct's ``instances``."""
        if isinstance(raw, Mapping) and isinstance(raw.get("instances"), list):
            for instance in raw["instances"]:
                if not isinstance(instance, Mapping):
                    raise Malformed("an instance is not an object with fields")
                yield converted(self.kind, {"instruction": raw.get("instruction"), **instance})
        else:
            yield converted(self.kind, raw)

    def _found(self, choice: tuple[str, ...]) -> bool:
        return find_local(self.data, *choice) is not None


@SOURCES.register("hh-rlhf")
class HelpfulHarmless(NamedSource):
    """Preference pairs of Anthropic's HH-RLHF (arXiv:2204.05862), dialogues as lists of turns.

    Where only the test files are there, all splits are cut from them by hash of the prompt. With
    train files, validation is cut from those and test is the test files.

    Args:
        data: data root and cache folder.
        subsets: of "harmless-base", "helpful-base", "helpful-online" and
            "helpful-rejection-sampled".
        revision: commit, branch or tag of ``Anthropic/hh-rlhf``; default: a pinned commit.

    Raises:
        ConfigError: an unknown subset.
    """

    name, kind = "hh-rlhf", "pairs"

    def __init__(
        self,
        data: DataConfig,
        *,
        subsets: Sequence[str] = HH_SUBSETS,
        revision: str | None = None,
    ) -> None:
        super().__init__(data, revision=revision)
        unknown = [subset for subset in subsets if subset not in HH_SUBSETS]
        if unknown or not subsets:
            raise ConfigError(f"hh-rlhf: subsets={list(subsets)}: choose from {list(HH_SUBSETS)}")
        self.subsets = tuple(subsets)
        self.description = f"hh-rlhf ({', '.join(self.subsets)})"
        splits = {"train": "train", "test": "test"}
        self.hub = tuple(
            HubSet("Anthropic/hh-rlhf", HH_REVISION, data_dir=subset, splits=splits)
            for subset in self.subsets
        )

    def files(self, stored: str) -> list[tuple[str, ...]]:
        """One file a subset, flat or in upstream's folders."""
        return [
            (f"hh-rlhf/{subset}.{stored}.jsonl", f"hh-rlhf/{subset}/{stored}.jsonl")
            for subset in self.subsets
        ]

    def stored(self, split: str) -> tuple[str, dict[str, float]]:
        """See the class."""
        if self.local("test") and not self.local("train"):
            return "test", HASHED_SHARES
        return ("test", {}) if split == "test" else ("train", VALIDATION_ONLY)

    def convert(self, raw: Any) -> Iterator[dict[str, Any]]:
        """Prompt (all before the last assistant turn) and the two last answers."""
        if not isinstance(raw, Mapping):
            raise Malformed(f"{type(raw).__name__} instead of an object with fields")
        chosen_text, rejected_text = text_field(raw, "chosen"), text_field(raw, "rejected")
        if chosen_text.rpartition(HH_ASSISTANT)[0] != rejected_text.rpartition(HH_ASSISTANT)[0]:
            raise DropRow("prompts differ")
        try:
            (turns, chosen), (_, rejected) = split_hh(chosen_text), split_hh(rejected_text)
        except DataError:
            raise DropRow("not a dialogue of turns") from None
        prompt = turns[0].text if len(turns) == 1 else turns
        yield checked_row(self.kind, {"prompt": prompt, "chosen": chosen, "rejected": rejected})


@SOURCES.register("gsm8k")
class GSM8K(NamedSource):
    """Grade-school problems with worked answers (arXiv:2110.14168); validation from train by hash.

    Args:
        data: data root and cache folder.
        revision: commit, branch or tag of ``openai/gsm8k``; default: a pinned commit.
    """

    name, kind = "gsm8k", "problems"
    hub = (
        HubSet(
            "openai/gsm8k",
            GSM8K_REVISION,
            config="main",
            splits={"train": "train", "test": "test"},
        ),
    )

    def files(self, stored: str) -> list[tuple[str, ...]]:
        """One file a stored split."""
        return [(f"gsm8k/{stored}.jsonl",)]

    def stored(self, split: str) -> tuple[str, dict[str, float]]:
        """Validation is cut from train."""
        return ("test", {}) if split == "test" else ("train", VALIDATION_ONLY)


def _in_folder(folder: str, name: str) -> tuple[str, ...]:
    return (f"{folder}/{name}", name)
