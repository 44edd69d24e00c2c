"""The eval stage: the same held-out tasks for the checkpoint of every stage.

Writes ``<run>/eval/result.json``: scores with intervals for each stage, samples side by side, and
for the last policy the choice among N samples by majority, verifier and oracle.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from modern_llm.alignment.sampling import sample_answers
from modern_llm.alignment.solutions import score_solutions
from modern_llm.alignment.stages.base import STAGES, Stage, load_policy
from modern_llm.alignment.stages.verifier import load_verifier
from modern_llm.alignment.suite import PolicyScores, Suite
from modern_llm.errors import CheckpointError
from modern_llm.evaluation.reasoning import grade_samples, reasoning_report
from modern_llm.evaluation.scores import NotEvaluated, split_results
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.artifacts import sha256_file, write_json
from modern_llm.runtime.devices import set_threads
from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.seeding import derive_seed
from modern_llm.training.checkpoint import MANIFEST, Checkpoint, read_checkpoint, verify_checkpoint
from modern_llm.training.handover import read_tokenizer

log = get_logger(__name__)
POLICIES = ("pretrain", "sft", "dpo")
NO_REFERENCE = NotEvaluated(
    "implicit_reward_accuracy", "the checkpoint that dpo was tuned from is not evaluated beside it"
)
OTHER_VERIFIER = NotEvaluated(
    "choice by the verifier", "it was trained on samples of another checkpoint than this policy"
)


@STAGES.register("eval")
class EvalStage(Stage):
    """Score all stages of the run, or one checkpoint. Writes ``<run>/eval/``."""

    name = "eval"

    def folders(self) -> dict[str, Path]:
        """The checkpoint that was given, or those of the run's finished stages, by stage."""
        if self.parent is not None:
            return {self.parent.meta["stage"]: self.parent.folder}
        finals = {stage: self.run / stage / "final" for stage in (*POLICIES, "verifier")}
        return {stage: path for stage, path in finals.items() if path.exists()}

    def outdated(self) -> bool:
        """Whether other checkpoints are to be evaluated now than when the stage began."""
        path = self.folder / "stage.json"
        return path.exists() and json.loads(path.read_text()) != self.record

    def claim(self) -> None:
        """Record in ``stage.json`` which checkpoints are evaluated."""
        write_json(self.folder / "stage.json", self.record, on_exists="skip")

    @cached_property
    def record(self) -> dict[str, dict[str, str]]:
        """Hash of the checkpoint of each stage.

        Raises:
            CheckpointError: one is damaged.
        """
        folders = self.folders()
        for folder in folders.values():
            verify_checkpoint(folder)
        return {"checkpoints": {s: sha256_file(p / MANIFEST) for s, p in folders.items()}}

    def execute(self) -> None:
        """Evaluate and write ``result.json``."""
        set_threads(self.config.eval.threads)
        suite = Suite(self.config)
        found = {stage: read_checkpoint(path) for stage, path in self.folders().items()}
        policies = [stage for stage in POLICIES if stage in found]
        if not policies:
            raise CheckpointError(
                f"nothing to evaluate: no finished stage below {self.run}, and no policy given; "
                "train one first, or give --checkpoint PATH"
            )
        models: list[dict[str, Any]] = []
        missing: list[dict[str, Any]] = []
        scored: dict[str, PolicyScores] = {}  # by the hash of the checkpoint
        policy: ModernDecoderLM | None = None
        for stage in policies:
            log.info("eval: %s", stage)
            tokenizer = read_tokenizer(found[stage])
            policy = load_policy(found[stage], suite.compute.device)
            reference = scored.get(_parent_sha256(found[stage])) if stage == "dpo" else None
            own = suite.evaluate(policy, tokenizer, reference=reference)
            scored[found[stage].sha256] = own
            scores, absent = split_results(own.results)
            missing += absent
            if stage == "dpo" and reference is None and suite.tasks.preference:
                missing.append(asdict(NO_REFERENCE))
            models.append(
                {
                    "stage": stage,
                    "checkpoint": _identity(found[stage]),
                    "scores": scores,
                    "samples": own.samples,
                }
            )
        reasoning, absent = self.reasoning(suite, found, policies[-1], policy)
        baselines, lacking = self.baselines(suite)
        write_json(
            self.folder / "result.json",
            {
                "format": 1,
                "stage": self.name,
                "status": "finished",
                "models": models,
                "reasoning": reasoning,
                "baselines": baselines,
                "not_evaluated": [*missing, *absent, *lacking],
                "provenance": self.provenance(seed=self.config.seed),
            },
            on_exists="skip",
        )

    def reasoning(
        self,
        suite: Suite,
        found: dict[str, Checkpoint],
        stage: str,
        policy: ModernDecoderLM | None,
    ) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Choice among N samples of the last policy, by the verifier where there is one."""
        task = self.config.eval.reasoning
        if task is None or policy is None:
            return None, []
        tokenizer = read_tokenizer(found[stage])
        precision = self.config.eval.precision
        key, problems = suite.problems
        questions = [row["question"] for row in problems]
        log.info("eval: %d samples for each of %d problems", task.n_samples, len(questions))
        drawn = sample_answers(
            policy, tokenizer, questions, n_samples=task.n_samples, temperature=task.temperature,
            max_new_tokens=task.max_new_tokens, precision=precision,
            seed=derive_seed(self.config.seed, "eval"),
        )  # fmt: skip
        groups = [[tokenizer.decode(answer.tokens) for answer in group] for group in drawn]
        pairs = [(q, t) for q, group in zip(questions, groups, strict=True) for t in group]
        likely = suite.logprobs(policy, tokenizer, [a for group in drawn for a in group])
        chosen: list[float] | None = None
        verifier = found.get("verifier")
        absent: list[NotEvaluated] = []
        if verifier is not None and _parent_sha256(verifier) != found[stage].sha256:
            verifier, absent = None, [OTHER_VERIFIER]
        if verifier is not None:
            chosen = score_solutions(
                load_verifier(verifier, suite.compute.device), tokenizer, pairs,
                batch_size=suite.compute.batch_size, precision=precision,
            )  # fmt: skip
        graded = []
        for i, (row, group) in enumerate(zip(problems, groups, strict=True)):
            own = slice(i * task.n_samples, (i + 1) * task.n_samples)
            best = None if chosen is None else chosen[own]
            graded.append(grade_samples(row["answer"], group, scores=best, logprobs=likely[own]))
        key = f"{key}/T{task.temperature:g}"
        report = reasoning_report(graded, key=key, ns=list(_doubling(task.n_samples)))
        scores, missing = split_results([*report.scores, *report.not_evaluated, *absent])
        return {
            "policy": stage,
            "verifier_sha256": verifier and verifier.sha256,
            "n_problems": report.n_problems,
            "temperature": task.temperature,
            "curves": report.curves,
            "scores": scores,
            "auroc": asdict(report.auroc) if report.auroc else None,
            "ece": asdict(report.ece) if report.ece else None,
            "reliability": [asdict(b) for b in report.bins],
            "base_rate": report.base_rate,
        }, missing

    def baselines(self, suite: Suite) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Perplexity of models from elsewhere, by the same protocols."""
        rows, missing = [], []
        for name in self.config.eval.baselines:
            scores, absent = split_results(suite.baseline(name))
            missing += absent
            if scores:
                rows.append({"name": name, "scores": scores})
        return rows, missing


def _parent_sha256(checkpoint: Checkpoint) -> str:
    """Hash of the checkpoint that this one was trained from; empty without one."""
    return str((checkpoint.meta.get("parent") or {}).get("sha256", ""))


def _identity(checkpoint: Checkpoint) -> dict[str, str]:
    return {"path": str(checkpoint.folder), "sha256": checkpoint.sha256}


def _doubling(largest: int) -> Iterator[int]:
    """1, 2, 4 and on, and ``largest`` itself."""
    size = 1
    while size < largest:
        yield size
        size *= 2
    yield largest
