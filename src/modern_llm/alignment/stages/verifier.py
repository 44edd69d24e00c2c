"""The verifier (Cobbe et al. 2021, arXiv:2110.14168): a token-level scorer of solutions.

It is trained on the policy's own graded samples for training problems, and picks the best of N
samples at test time. Problems, not samples, are split between training and validation.
"""

import itertools
import json
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from modern_llm.alignment.sampling import sample_texts
from modern_llm.alignment.solutions import VerifierObjective, score_solutions
from modern_llm.alignment.stages.base import STAGES, TrainedStage, load_policy
from modern_llm.config import VerifierConfig
from modern_llm.data.collate import AnswerBatch, collate_answers
from modern_llm.data.corruption import corrupt_solution
from modern_llm.data.draws import shuffle
from modern_llm.data.loader import BucketLoader
from modern_llm.data.prepare import prompt_hash, prompt_hashes, solution_ids, solution_store
from modern_llm.data.sources import open_source
from modern_llm.data.sources.base import RowCounts, Source
from modern_llm.data.store import TokenStore
from modern_llm.errors import DataError
from modern_llm.evaluation.answers import grade
from modern_llm.evaluation.calibration import auroc_score, auroc_within_score, ece_score
from modern_llm.evaluation.intervals import share_interval
from modern_llm.evaluation.scores import Result, Score
from modern_llm.models import ModernDecoderLM, VerifierModel
from modern_llm.runtime.artifacts import sha256_json, write_json, write_text
from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.ranks import group
from modern_llm.runtime.seeding import derive_seed
from modern_llm.training.checkpoint import Checkpoint, load_model_weights, read_checkpoint
from modern_llm.training.handover import model_config
from modern_llm.training.records import FitResult

log = get_logger(__name__)
Solution = dict[str, Any]  # question, text, label (1 right), origin


def load_verifier(checkpoint: Checkpoint, device: torch.device) -> VerifierModel:
    """The verifier of a checkpoint, in eval mode.

    Raises:
        CheckpointError: the checkpoint holds something else.
    """
    model = VerifierModel(model_config(checkpoint))
    load_model_weights(model, checkpoint)
    return model.to(device).eval()


def top_up(
    samples: list[Solution], worked: dict[str, str], *, config: VerifierConfig, seed: int
) -> list[Solution]:
    """Add worked solutions, and corruptions of them, until both classes have their least share.

    They go through the questions in random order: what a question is about says nothing of the
    label.

    Args:
        samples: graded samples of the policy.
        worked: the data set's solution of each question.
        config: ``min_right`` and ``min_wrong``.
        seed: of the order and the corruptions.
    """
    questions = sorted(worked)
    rng = random.Random(derive_seed("corrupt", seed))
    shuffle(rng, questions)
    added: list[Solution] = []
    for label, least in ((1, config.min_right), (0, config.min_wrong)):
        have = sum(s["label"] == label for s in samples)
        other = len(samples) - have
        missing = max(0, int(np.ceil(least / (1 - least) * other)) - have)
        for question in itertools.islice(itertools.cycle(questions), missing):
            text = worked[question] if label else corrupt_solution(worked[question], rng)
            origin = "worked solution" if label else "corrupted solution"
            added.append({"question": question, "text": text, "label": label, "origin": origin})
    return samples + added


@STAGES.register("verifier")
class VerifierStage(TrainedStage):
    """Learn which of the policy's solutions are right. Needs ``dpo``; writes ``<run>/verifier/``.

    ``samples-train.jsonl`` and ``samples-validation.jsonl`` hold what it is trained and tested on,
    and a ``.json`` beside each the fingerprints of the problems and what was dropped.
    """

    name = "verifier"
    starts_from = "dpo"

    @property
    def section(self) -> VerifierConfig:
        """The stage's part of the config."""
        return self.config.verifier

    def _kept_apart(self) -> list[tuple[Source, str]]:
        """Sources and splits whose problems are not trained on: held out, or tested on."""
        apart = [(source, "validation") for source in self.sources("validation")]
        if (task := self.config.eval.reasoning) is not None:
            apart.append((open_source(task.source, self.config.data), task.split))
        return apart

    def _problems(self, split: str, counts: RowCounts) -> dict[str, str]:
        """Question -> worked solution; training problems kept apart are left out and counted."""
        section, apart = self.section, frozenset[str]()
        if split == "train":
            apart = apart.union(*(prompt_hashes([s], part) for s, part in self._kept_apart()))
        count = section.n_problems if split == "train" else section.n_validation_problems
        problems: dict[str, str] = {}
        for row in self.rows(split, counts):
            if len(problems) == count:
                break
            if prompt_hash(row["question"]) in apart:
                counts.drop("problem is in another split")
            else:
                problems.setdefault(row["question"], row["answer"])
        if not problems:
            raise DataError(f"verifier: no {split} problem in {self.section.data}")
        return problems

    def _fingerprints(self, split: str) -> list[str]:
        """Hashes of all data that decides the problems of a split."""
        read = [(source, split) for source in self.sources(split)]
        apart = self._kept_apart() if split == "train" else []
        return [source.fingerprint(part) for source, part in (*read, *apart)]

    @cached_property
    def policy(self) -> ModernDecoderLM:
        """The model whose samples are judged."""
        assert self.parent is not None
        return load_policy(self.parent, self.device, self.config.model)

    def _sample(self, split: str, counts: RowCounts) -> list[Solution]:
        """Graded samples of the policy that fit into a row, topped up for training."""
        section, problems = self.section, self._problems(split, counts)
        log.info(
            "verifier: sampling %d solutions to %d %s problems",
            section.samples_per_problem, len(problems), split,
        )  # fmt: skip
        texts = sample_texts(
            self.policy, self.tokenizer, list(problems), n_samples=section.samples_per_problem,
            temperature=section.temperature, max_new_tokens=section.max_new_tokens,
            seed=derive_seed(section.training.seed, "verifier", split),
            precision=section.training.precision,
        )  # fmt: skip
        solutions = self._fitting(
            [
                {"question": q, "text": t, "label": int(grade(t, gold)), "origin": "sample"}
                for (q, gold), group in zip(problems.items(), texts, strict=True)
                for t in group
            ],
            counts,
        )
        if split != "train":
            return solutions
        rows = [{"question": q, "text": text} for q, text in problems.items()]
        worked = {s["question"]: s["text"] for s in self._fitting(rows, RowCounts())}
        solutions = top_up(solutions, worked, config=section, seed=section.training.seed)
        return self._fitting(solutions, counts)  # a corruption may be a little longer

    def _fitting(self, solutions: list[Solution], counts: RowCounts) -> list[Solution]:
        """Solutions with room in a row of ``training.seq_len``; the others are counted."""
        texts = ((s["question"], s["text"]) for s in solutions)
        rows = solution_ids(self.tokenizer, texts, max_tokens=self.section.training.seq_len)
        kept = [s for s, row in zip(solutions, rows, strict=True) if row is not None]
        for _ in range(len(solutions) - len(kept)):
            counts.drop("too long")
        return kept

    def _solutions(self, split: str) -> list[Solution]:
        """Solutions of a split; kept in a file, so that they are drawn once."""
        path = self.folder / f"samples-{split}.jsonl"
        record = path.with_suffix(".json")  # written last
        if not record.exists():
            counts = RowCounts(max_bad_rows=self.config.data.max_bad_rows)
            lines = "".join(json.dumps(s) + "\n" for s in self._sample(split, counts))
            write_text(path, lines, on_exists="replace")
            facts = {"sources": self._fingerprints(split), "dropped": counts.dropped}
            write_json(record, facts, on_exists="skip")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def _facts(self, split: str) -> dict[str, Any]:
        """Fingerprints of the problems of a split, and counts of what was dropped."""
        facts: dict[str, Any] = json.loads((self.folder / f"samples-{split}.json").read_text())
        return facts

    def _check_problems(self, split: str) -> None:
        """Refuse solutions to problems that are not those of the data any more."""
        if self._facts(split)["sources"] == self._fingerprints(split):
            return
        told = f"the problems changed since {self.folder / f'samples-{split}.jsonl'} was sampled"
        if not self.allow_data_change:
            raise DataError(f"{told}; start a new run, or allow it with --allow-data-change")
        log.warning("%s; going on with these samples, as asked", told)

    def _store(self, split: str) -> TokenStore:
        solutions = self._solutions(split)
        return solution_store(
            ((s["question"], s["text"], float(s["label"])) for s in solutions),
            self.tokenizer, self.config.data,
            key={"solutions": sha256_json(solutions)}, max_tokens=self.section.training.seq_len,
        )  # fmt: skip

    @cached_property
    def store(self) -> TokenStore:
        """Solutions to training problems."""
        return self._store("train")

    @cached_property
    def validation_store(self) -> TokenStore:
        """The policy's samples for held-out problems, none added."""
        return self._store("validation")

    def _loader(self, store: TokenStore) -> BucketLoader[AnswerBatch]:
        training = self.section.training
        return BucketLoader(
            store,
            batch_size=training.batch_size, micro_batch_size=training.micro_batch_size,
            seed=training.seed, collate=collate_answers, ranks=group().ranks,
        )  # fmt: skip

    def loader(self) -> BucketLoader[AnswerBatch]:
        """Solutions in random order."""
        return self._loader(self.store)

    def validation(self) -> Sequence[AnswerBatch]:
        """Every held-out sample once."""
        return self._loader(self.validation_store).one_pass()

    def data_records(self) -> list[dict[str, Any]]:
        """Rows, tokens and origin of both sets of solutions."""
        records = []
        for split, store in (("train", self.store), ("validation", self.validation_store)):
            solutions = self._solutions(split)
            origins = sorted({s["origin"] for s in solutions})
            counts = ", ".join(f"{sum(s['origin'] == o for s in solutions)} {o}s" for o in origins)
            records.append(
                {
                    "source": f"solutions of the {self.starts_from} policy ({counts})",
                    "split": split,
                    "kind": "solutions",
                    "rows": len(store),
                    "tokens": store.n_tokens,
                    "dropped": self._facts(split)["dropped"],
                    "fingerprint": store.fingerprint,
                }
            )
        return records

    def objective(self) -> VerifierObjective:
        """Token-level correctness and the joint language-model loss."""
        return VerifierObjective(self.section.lm_coef)

    def build_model(self) -> VerifierModel:
        """The policy's trunk with a fresh scalar head."""
        torch.manual_seed(derive_seed(self.section.training.seed, "value head"))
        model = VerifierModel(self.config.model)
        assert self.parent is not None
        load_model_weights(model.trunk, self.parent)
        return model

    def fill(self, model: nn.Module) -> None:
        """The same head and trunk."""
        assert isinstance(model, VerifierModel) and self.parent is not None
        model.initialize_again()
        load_model_weights(model.trunk, self.parent)

    def published(self, fit: FitResult) -> VerifierModel:
        """The trained verifier whole."""
        return load_verifier(read_checkpoint(fit.checkpoint), self.device)

    def audit(self) -> dict[str, Any]:
        """Share of right solutions, in all and among the policy's own samples.

        Raises:
            DataError: there is one class alone, or the problems are not those that were sampled.
        """
        solutions = self._solutions("train")
        self._solutions("validation")
        for split in ("train", "validation"):
            self._check_problems(split)
        labels = [s["label"] for s in solutions]
        own = [s["label"] for s in solutions if s["origin"] == "sample"]
        if len(set(labels)) < 2:
            raise DataError(
                "verifier: all training solutions have the same label; nothing to learn"
            )
        return {
            "solutions": len(labels),
            "right_share": float(np.mean(labels)),
            "samples": len(own),
            "base_rate": float(np.mean(own)),
        }

    def scores(self, model: VerifierModel) -> list[Result]:
        """AUROC and calibration on the policy's samples for held-out problems."""
        solutions = self._solutions("validation")
        scores = score_solutions(
            model, self.tokenizer, [(s["question"], s["text"]) for s in solutions],
            batch_size=self.section.training.micro_batch_size,
            precision=self.section.training.precision,
            max_tokens=self.section.training.seq_len,
        )  # fmt: skip
        right = [s["label"] == 1 for s in solutions]
        number = {q: i for i, q in enumerate(dict.fromkeys(s["question"] for s in solutions))}
        problems = [number[s["question"]] for s in solutions]
        key = "solutions.validation"
        interval = share_interval(np.bincount(problems, right), np.bincount(problems))
        note = "right samples; bootstrap over problems"
        return [
            Score(key, "base_rate", float(np.mean(right)), interval, len(right), note),
            auroc_score(scores, right, problems, key=key),
            auroc_within_score(scores, right, problems, key=key),
            ece_score(scores, right, problems, key=key),
        ]
