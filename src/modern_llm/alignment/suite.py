"""The held-out tasks of a config, run on any policy: one suite for the eval stage and comparisons.

Every task uses the template of training. Greedy answers are graded for all policies alike.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from modern_llm.alignment.preferences import pair_logprobs
from modern_llm.alignment.sampling import Answer, continue_text, sample_texts
from modern_llm.config import EvalTask, PipelineConfig, PreferenceTask, ReasoningTask
from modern_llm.data.collate import collate_pairs
from modern_llm.data.prepare import pair_store
from modern_llm.data.sources import open_source
from modern_llm.data.sources.base import RowCounts
from modern_llm.data.store import TokenStore
from modern_llm.data.templates import answer_ids, prompt_text, prompts_ids
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.evaluation.baselines import load_baseline
from modern_llm.evaluation.likelihood import Compute, answer_bits_per_byte, answer_nats
from modern_llm.evaluation.perplexity import all_protocols, perplexity
from modern_llm.evaluation.preference import preference_scores
from modern_llm.evaluation.reasoning import exact_match
from modern_llm.evaluation.scores import NotEvaluated, Result
from modern_llm.evaluation.text_metrics import text_metric
from modern_llm.evaluation.wikitext import detokenize
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.devices import autocast, check_precision, resolve_device
from modern_llm.runtime.logs import get_logger

log = get_logger(__name__)
SHOWN_PROBLEMS = 3  # problems whose answers are shown beside the config's prompts


@dataclass
class PolicyScores:
    """What the suite finds for one policy.

    Attributes:
        results: scores, and what could not be had.
        samples: rows of task, prompt and text, in the same order for every policy.
        pair_logprobs: ``(P, 2)`` array of the held-out pairs in nats: the reference of
            the DPO policy that comes after.
    """

    results: list[Result] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    pair_logprobs: Any = None


def preference_store(
    config: PipelineConfig, task: PreferenceTask, tokenizer: Tokenizer
) -> TokenStore:
    """Held-out pairs of a task, cut as DPO cuts its own."""
    return pair_store(
        [open_source(task.source, config.data)], task.split, tokenizer, config.data,
        max_prompt=config.dpo.max_prompt_tokens, max_answer=config.dpo.max_answer_tokens,
        max_rows=task.max_pairs,
    )  # fmt: skip


class Suite:
    """The tasks of ``config.eval``, by the same rows for every policy."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config, self.tasks = config, config.eval
        device = resolve_device(self.tasks.device, field="eval.device")
        check_precision(self.tasks.precision, device, field="eval.precision")
        self.compute = Compute(device, self.tasks.batch_size, self.tasks.precision)

    def read(self, task: EvalTask, limit: int | None) -> tuple[str, list[dict[str, Any]]]:
        """What names a task's data in keys, and its first ``limit`` rows.

        Where the limit cuts the split, the key says so: ``wikitext2.test/first200``.
        """
        counts = RowCounts(max_bad_rows=self.config.data.max_bad_rows)
        found = open_source(task.source, self.config.data).rows(task.split, counts)
        rows = list(itertools.islice(found, limit))
        cut = limit is not None and next(found, None) is not None
        return f"{task.key}/first{limit}" if cut else task.key, rows

    @cached_property
    def problems(self) -> tuple[str, list[dict[str, Any]]]:
        """Held-out problems (question and worked answer) behind their key; none without a task."""
        task = self.tasks.reasoning
        return self.read(task, task.n_problems) if task else ("", [])

    def evaluate(
        self, model: ModernDecoderLM, tokenizer: Tokenizer, *, reference: PolicyScores | None = None
    ) -> PolicyScores:
        """Run all tasks on one policy.

        Args:
            model: a decoder on the suite's device.
            tokenizer: its tokenizer.
            reference: scores of the model that it was tuned from by DPO; adds the accuracy of
                the implicit reward.
        """
        found = PolicyScores()
        found.results += self.perplexity(model, tokenizer, model.config.max_seq_len)
        if self.tasks.reasoning:
            found.results += self.greedy(model, tokenizer, self.tasks.reasoning)
        if self.tasks.preference:
            before = reference.pair_logprobs if reference else None
            results, found.pair_logprobs = self.preference(model, tokenizer, before)
            found.results += results
        found.results += self.text_metrics(model, tokenizer)
        found.samples = self.samples(model, tokenizer)
        return found

    def perplexity(self, model: nn.Module, tokenizer: Any, context: int) -> list[Result]:
        """Every protocol on every text task.

        Args:
            model: ours, or a baseline behind the same call.
            tokenizer: its own.
            context: longest input of the model, in tokens.
        """
        results: list[Result] = []
        for task in self.tasks.perplexity:
            key, rows = self.read(task, task.max_texts)
            texts = [row["text"] for row in rows]
            window = min(task.context or context, context)
            pages = task.source.name.startswith("wikitext")
            results += all_protocols(
                model, tokenizer,
                ["\n".join(texts)] if pages else texts,  # as published: WikiText is one stretch
                key=key, context=window, compute=self.compute,
            )  # fmt: skip
            if pages:
                results += perplexity(
                    model, tokenizer, texts,
                    key=key, context=window, compute=self.compute, detokenize=detokenize,
                )  # fmt: skip
        return results

    def baseline(self, name: str) -> list[Result]:
        """Perplexity of a transformers model by the same protocols, or why it cannot be had."""
        found = load_baseline(name, device=self.compute.device)
        if isinstance(found, NotEvaluated):
            return [found]
        return self.perplexity(found.model, found.tokenizer, found.context)

    def answers(
        self, model: ModernDecoderLM, tokenizer: Tokenizer, prompts: list[Any], max_new_tokens: int
    ) -> list[str]:
        """One greedy answer to each prompt."""
        texts = sample_texts(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens,
            precision=self.tasks.precision,
        )  # fmt: skip
        return [answers[0] for answers in texts]

    def greedy(
        self, model: ModernDecoderLM, tokenizer: Tokenizer, task: ReasoningTask
    ) -> list[Result]:
        """Exact match of greedy answers, and bits per byte of the gold answers."""
        key, problems = self.problems
        questions = [row["question"] for row in problems]
        gold = [row["answer"] for row in problems]
        answers = self.answers(model, tokenizer, questions, task.max_new_tokens)
        results = exact_match(gold, answers, key=f"{key}/greedy")
        prompts = prompts_ids(tokenizer, questions)
        rows = [(ids, answer_ids(tokenizer, text)) for ids, text in zip(prompts, gold, strict=True)]
        gold_bits = answer_bits_per_byte(
            model, rows, [len(text.encode()) for text in gold], self.compute,
            key=f"{key}/gold+eos", max_tokens=model.config.max_seq_len,
        )  # fmt: skip
        return [*results, gold_bits]

    def logprobs(
        self, model: ModernDecoderLM, tokenizer: Tokenizer, answers: list[Answer]
    ) -> list[float]:
        """Log-probability in nats of each answer as it was drawn; EOS counts where it was drawn."""
        eos = [tokenizer.eos_id]
        rows = [(a.prompt, a.tokens + eos if a.finished else a.tokens) for a in answers]
        limit = model.config.max_seq_len
        return [-nats for nats in answer_nats(model, rows, self.compute, max_tokens=limit)]

    def preference(
        self, model: nn.Module, tokenizer: Tokenizer, reference_P2: Any | None
    ) -> tuple[list[Result], Any]:
        """Accuracy on held-out pairs, and their log-probabilities ``(P, 2)``."""
        task = self.tasks.preference
        assert task is not None
        store = preference_store(self.config, task, tokenizer)
        pairs_P2 = np.concatenate(
            [
                self._pair_batch(
                    model, store, range(at, min(at + self.compute.batch_size, len(store)))
                )
                for at in range(0, len(store), self.compute.batch_size)
            ]
        )
        lengths = store.lengths()
        results = preference_scores(
            pairs_P2[:, 0].tolist(), pairs_P2[:, 1].tolist(),
            chosen_lengths=lengths[:, 1].tolist(), rejected_lengths=lengths[:, 2].tolist(),
            key=self.read(task, task.max_pairs)[0],
            reference=None if reference_P2 is None else tuple(reference_P2.T.tolist()),
        )  # fmt: skip
        return results, pairs_P2

    def _pair_batch(self, model: nn.Module, store: Any, rows: range) -> Any:
        batch = collate_pairs(store, list(rows)).to(self.compute.device)
        with torch.inference_mode(), autocast(self.compute.device, self.compute.precision):
            return pair_logprobs(model, batch).cpu().numpy()

    def text_metrics(self, model: ModernDecoderLM, tokenizer: Tokenizer) -> list[Result]:
        """Metrics of the ``evaluate`` library on greedy answers."""
        results: list[Result] = []
        for task in self.tasks.text_metrics:
            key, rows = self.read(task, task.max_rows)
            prompts = [row["question"] if "question" in row else row["prompt"] for row in rows]
            answers = self.answers(model, tokenizer, prompts, task.max_new_tokens)
            results += text_metric(
                task.metric, answers, [row["answer"] for row in rows],
                key=f"{key}/greedy",
            )  # fmt: skip
        return results

    def samples(self, model: ModernDecoderLM, tokenizer: Tokenizer) -> list[dict[str, str]]:
        """Greedy answers to the config's prompts and to a few problems, and continued texts."""
        questions = [row["question"] for row in self.problems[1][:SHOWN_PROBLEMS]]
        shown: list[dict[str, str]] = []
        for kind, prompts in (("prompt", list(self.tasks.prompts)), ("problem", questions)):
            if prompts:
                texts = self.answers(model, tokenizer, prompts, self.tasks.sample_tokens)
                shown += [
                    {"task": kind, "prompt": prompt_text(prompt), "text": text}
                    for prompt, text in zip(prompts, texts, strict=True)
                ]
        for text in self.tasks.completions:
            done = continue_text(
                model, tokenizer, text,
                max_new_tokens=self.tasks.sample_tokens, precision=self.tasks.precision,
            )  # fmt: skip
            shown.append({"task": "completion", "prompt": text, "text": done})
        return shown
