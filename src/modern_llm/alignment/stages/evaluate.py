"""The eval stage: the same held-out tasks for the checkpoint of every stage.

Writes ``<run>/eval/result.json``: scores with intervals for each stage, samples side by side, and
for the last policy the choice among N samples by majority, verifier and oracle.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from modern_llm.alignment.sampling import sample_answers
from modern_llm.alignment.stages.base import STAGES, Stage, load_policy
from modern_llm.alignment.stages.verifier import load_verifier, score_solutions
from modern_llm.alignment.suite import PolicyScores, Suite
from modern_llm.errors import CheckpointError
from modern_llm.evaluation.reasoning import grade_samples, reasoning_report
from modern_llm.evaluation.scores import split_results
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.artifacts import write_json
from modern_llm.runtime.devices import set_threads
from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.seeding import derive_seed
from modern_llm.training.checkpoint import Checkpoint, read_checkpoint
from modern_llm.training.handover import read_tokenizer

log = get_logger(__name__)
POLICIES = ("pretrain", "sft", "dpo")


@STAGES.register("eval")
class EvalStage(Stage):
    """Score all stages of the run, or one checkpoint. Writes ``<run>/eval/``."""

    name = "eval"

    def checkpoints(self) -> dict[str, Checkpoint]:
        """The checkpoint that was given, or those of the run's finished stages, by stage."""
        if self.parent is not None:
            return {self.parent.meta["stage"]: self.parent}
        folders = {stage: self.run / stage / "final" for stage in (*POLICIES, "verifier")}
        return {stage: read_checkpoint(path) for stage, path in folders.items() if path.exists()}

    def execute(self) -> None:
        """Evaluate and write ``result.json``."""
        set_threads(self.config.eval.threads)
        suite = Suite(self.config)
        found = self.checkpoints()
        policies = [stage for stage in POLICIES if stage in found]
        if not policies:
            raise CheckpointError(
                f"nothing to evaluate: no finished stage below {self.run}, and no policy given; "
                "train one first, or give --checkpoint PATH"
            )
        models: list[dict[str, Any]] = []
        missing: list[dict[str, Any]] = []
        before: PolicyScores | None = None
        policy: ModernDecoderLM | None = None
        for stage in policies:
            log.info("eval: %s", stage)
            tokenizer = read_tokenizer(found[stage])
            policy = load_policy(found[stage], suite.compute.device)
            tuned = stage == "dpo" and "sft" in found
            before = suite.evaluate(policy, tokenizer, reference=before if tuned else None)
            scores, absent = split_results(before.results)
            missing += absent
            models.append(
                {
                    "stage": stage,
                    "checkpoint": _identity(found[stage]),
                    "scores": scores,
                    "samples": before.samples,
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
        if "verifier" in found:
            chosen = score_solutions(
                load_verifier(found["verifier"], suite.compute.device), tokenizer, pairs,
                batch_size=suite.compute.batch_size, precision=precision,
            )  # fmt: skip
        graded = []
        for i, (row, group) in enumerate(zip(problems, groups, strict=True)):
            own = slice(i * task.n_samples, (i + 1) * task.n_samples)
            best = None if chosen is None else chosen[own]
            graded.append(grade_samples(row["answer"], group, scores=best, logprobs=likely[own]))
        key = f"{key}/T{task.temperature:g}"
        report = reasoning_report(graded, key=key, ns=list(_doubling(task.n_samples)))
        scores, missing = split_results([*report.scores, *report.not_evaluated])
        return {
            "policy": stage,
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


def _identity(checkpoint: Checkpoint) -> dict[str, str]:
    return {"path": str(checkpoint.folder), "sha256": checkpoint.sha256}


def _doubling(largest: int) -> Iterator[int]:
    """1, 2, 4 and on, and ``largest`` itself."""
    size = 1
    while size < largest:
        yield size
        size *= 2
    yield largest
