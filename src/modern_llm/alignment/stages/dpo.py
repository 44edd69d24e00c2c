"""Direct preference optimisation against the frozen SFT model."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from modern_llm.alignment.preferences import DPOObjective, pair_logprobs
from modern_llm.alignment.reference import reference_logprobs
from modern_llm.alignment.sampling import sample_ids
from modern_llm.alignment.stages.base import STAGES, TrainedStage, build_policy, load_policy
from modern_llm.config import DPOConfig
from modern_llm.data.collate import PairBatch, collate_pairs
from modern_llm.data.loader import BucketLoader
from modern_llm.data.prepare import pair_store, prompt_hashes
from modern_llm.data.store import TokenStore
from modern_llm.evaluation.intervals import bootstrap_mean
from modern_llm.evaluation.likelihood import Compute, answer_nats
from modern_llm.evaluation.preference import preference_scores
from modern_llm.evaluation.scores import Result, Score
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.devices import autocast
from modern_llm.runtime.ranks import group
from modern_llm.training.records import FirstLoss

FIRST_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}  # nats; rounding of the forward
KL_PROMPTS = 64  # held-out prompts that the policy answers for the estimate
KL_TEMPERATURE = 1.0


@STAGES.register("dpo")
class DPOStage(TrainedStage):
    """Prefer chosen over rejected answers. Needs ``sft``; writes ``<run>/dpo/``."""

    name = "dpo"
    starts_from = "sft"

    @property
    def section(self) -> DPOConfig:
        """The stage's part of the config."""
        return self.config.dpo

    def _store(self, split: str, exclude: frozenset[str] = frozenset()) -> TokenStore:
        return pair_store(
            self.sources(split), split, self.tokenizer, self.config.data,
            max_prompt=self.section.max_prompt_tokens, max_answer=self.section.max_answer_tokens,
            max_rows=self.section.max_validation_rows if split == "validation" else None,
            exclude=exclude,
        )  # fmt: skip

    @cached_property
    def validation_store(self) -> TokenStore:
        """Held-out pairs."""
        return self._store("validation")

    @cached_property
    def store(self) -> TokenStore:
        """Training pairs whose prompts are not held out."""
        rows = self.section.max_validation_rows
        return self._store("train", prompt_hashes(self.sources("validation"), "validation", rows))

    def _loader(self, store: TokenStore) -> BucketLoader[PairBatch]:
        training = self.section.training
        return BucketLoader(
            store,
            batch_size=training.batch_size, micro_batch_size=training.micro_batch_size,
            seed=training.seed, collate=collate_pairs, ranks=group().ranks,
        )  # fmt: skip

    def loader(self) -> BucketLoader[PairBatch]:
        """Pairs in random order."""
        return self._loader(self.store)

    def validation(self) -> Sequence[PairBatch]:
        """Every held-out pair once."""
        return self._loader(self.validation_store).one_pass()

    def data_records(self) -> list[dict[str, Any]]:
        """Summaries of both stores."""
        return [*self.store.sources, *self.validation_store.sources]

    def build_model(self) -> ModernDecoderLM:
        """The SFT model, left in eval mode: no dropout, as in the reference."""
        assert self.parent is not None
        return build_policy(self.parent, self.config.model).eval()

    def _reference(self, store: TokenStore) -> Tensor:
        assert self.parent is not None
        parent = self.parent
        return reference_logprobs(
            lambda: load_policy(parent, self.device, self.config.model), pair_logprobs, store,
            model_sha256=parent.sha256, cache_dir=self.config.data.cache_dir,
            batch_size=self.section.training.micro_batch_size,
            precision=self.section.training.precision,
        )  # fmt: skip

    def objective(self) -> DPOObjective:
        """Loss against the cached reference of the training pairs."""
        return DPOObjective(self.section, self._train_reference)

    @cached_property
    def _train_reference(self) -> Tensor:
        return self._reference(self.store)

    @cached_property
    def _validation_reference(self) -> Tensor:
        return self._reference(self.validation_store)

    def validation_objective(self) -> DPOObjective:
        """The same loss against the cached reference of the held-out pairs."""
        return DPOObjective(self.section, self._validation_reference)

    def first_loss(self) -> FirstLoss:
        """The policy is the reference at step 0; a run whose loss says otherwise is refused."""
        tolerance = FIRST_LOSS_TOLERANCE[self.section.training.precision]
        expected = self.objective().at_reference()
        return FirstLoss(expected, tolerance, "the policy is the reference", refuse=True)

    def scores(self, model: ModernDecoderLM) -> list[Result]:
        """Held-out accuracy beside the longer-answer baseline, and KL to the reference."""
        reference_P2 = self._validation_reference
        policy_P2 = torch.empty_like(reference_P2)
        with torch.inference_mode(), autocast(self.device, self.section.training.precision):
            for batch in self.validation():
                policy_P2[batch.index_B] = pair_logprobs(model, batch.to(self.device)).cpu()
        lengths = self.validation_store.lengths()
        results = preference_scores(
            policy_P2[:, 0].tolist(), policy_P2[:, 1].tolist(),
            chosen_lengths=lengths[:, 1].tolist(), rejected_lengths=lengths[:, 2].tolist(),
            key="pairs.validation",
            reference=(reference_P2[:, 0].tolist(), reference_P2[:, 1].tolist()),
        )  # fmt: skip
        return [*results, self.kl(model)]

    def kl(self, model: ModernDecoderLM) -> Score:
        """KL(policy || reference) of whole answers in nats, estimated on the policy's samples."""
        assert self.parent is not None
        room = model.config.max_seq_len - self.section.max_answer_tokens
        longest = self.section.max_answer_tokens
        count = min(KL_PROMPTS, len(self.validation_store))
        prompts = [self.validation_store.record(i)[0].tolist()[-room:] for i in range(count)]
        answers = sample_ids(
            model, self.tokenizer, prompts,
            max_new_tokens=longest, temperature=KL_TEMPERATURE,
            seeds=list(range(count)),
        )  # fmt: skip
        rows = [  # an answer that ran out of tokens has no EOS
            (prompt, answer if len(answer) == longest else [*answer, self.tokenizer.eos_id])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        compute = Compute(self.device, self.section.training.micro_batch_size)
        limit = model.config.max_seq_len
        reference = load_policy(self.parent, self.device, self.config.model)
        ours, theirs = (
            list(answer_nats(m, rows, compute, max_tokens=limit)) for m in (model, reference)
        )
        ratios = [before - now for now, before in zip(ours, theirs, strict=True)]
        note = f"{count} sampled answers at temperature {KL_TEMPERATURE}; bootstrap over answers"
        value = sum(ratios) / count
        return Score(
            "pairs.validation", "kl_to_reference", value, bootstrap_mean(ratios), count, note
        )
