"""The ``synthetic`` source: generated rows of every kind; needs no file and no network."""

import random
from collections.abc import Iterator
from typing import Any

from modern_llm.config import DataConfig
from modern_llm.data.problems import draw_problem, level_of, split_of
from modern_llm.data.sources.base import KINDS, SOURCES, RowCounts, Source, check_split
from modern_llm.data.synthetic import instruction, rejected_answer, text_row
from modern_llm.errors import ConfigError
from modern_llm.runtime.artifacts import sha256_json
from modern_llm.runtime.seeding import derive_seed

FORMAT = 2  # raised when the bytes of any row change
MAX_TRIES = 20_000  # draws for one row before a split counts as used up


@SOURCES.register("synthetic")
class SyntheticSource(Source):
    """Generated rows of one kind; each is a function of (seed, kind, split, row number).

    Args:
        data: not used; every source takes it.
        kind: "text", "instruct", "pairs" or "problems".
        rows: rows of the train split.
        held_out_rows: rows of the validation and of the test split.
        difficulty: 1 to 5, the size of numbers and the number of steps.
        problem_share: share of worked problems among instructions and pairs.
        seed: another seed gives other rows; the split of a problem never changes.

    Raises:
        ConfigError: an option is out of range, or the held-out problems do not suffice.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        kind: str = "text",
        rows: int = 20_000,
        held_out_rows: int = 500,
        difficulty: int = 2,
        problem_share: float = 0.75,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"synthetic: kind={kind!r}: use one of {', '.join(KINDS)}")
        if min(rows, held_out_rows) < 1:
            raise ConfigError(f"synthetic: rows={rows}, held_out_rows={held_out_rows}: at least 1")
        if not 0 <= problem_share <= 1:
            raise ConfigError(f"synthetic: problem_share={problem_share}: from 0 to 1")
        self.kind = kind
        self.n_rows = {"train": rows, "validation": held_out_rows, "test": held_out_rows}
        self.level, self.difficulty, self.seed = level_of(difficulty), difficulty, seed
        self.problem_share = problem_share
        self.description = f"synthetic {kind}, difficulty {difficulty}"

    def rows(self, split: str, counts: RowCounts | None = None) -> Iterator[dict[str, Any]]:
        """Rows of a split; held-out problems and instructions do not repeat."""
        check_split(split)
        seen: set[str] = set()
        for row in range(self.n_rows[split]):
            rng = random.Random(derive_seed("synthetic", self.seed, self.kind, split, row))
            if self.kind == "text":
                yield text_row(rng, self.level)
                continue
            prompt, answer = self._task(rng, split, seen)
            if self.kind == "problems":
                yield {"question": prompt, "answer": answer}
            elif self.kind == "instruct":
                yield {"prompt": prompt, "answer": answer}
            else:
                rejected = rejected_answer(rng, answer)
                yield {"prompt": prompt, "chosen": answer, "rejected": rejected}

    def fingerprint(self, split: str = "train") -> str:
        """Hash of the format and the options."""
        options = [self.kind, self.n_rows[split], self.difficulty, self.problem_share, self.seed]
        return sha256_json(["synthetic", FORMAT, check_split(split), options])

    def _task(self, rng: random.Random, split: str, seen: set[str]) -> tuple[str, str]:
        """A problem or an instruction of the split; a held-out one is not among ``seen``."""
        share = 1.0 if self.kind == "problems" else self.problem_share
        draw = self._problem if rng.random() < share else self._instruction
        for _ in range(MAX_TRIES):
            key, prompt, answer = draw(rng)
            if split_of(key) != split:
                continue
            if split == "train":
                return prompt, answer
            if key not in seen:
                seen.add(key)
                return prompt, answer
        raise ConfigError(
            f"synthetic: difficulty={self.difficulty} has only about {len(seen)} different "
            f"{split} problems; ask for fewer held_out_rows or a higher difficulty"
        )

    def _problem(self, rng: random.Random) -> tuple[str, str, str]:
        problem = draw_problem(rng, self.level)
        return problem.key, problem.question, problem.answer

    def _instruction(self, rng: random.Random) -> tuple[str, str, str]:
        prompt, answer = instruction(rng)
        return prompt, prompt, answer
