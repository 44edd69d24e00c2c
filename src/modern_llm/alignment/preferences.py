"""Losses on preference pairs (DPO, IPO) against cached reference log-probabilities.

A pair is one row, ``[prompt][chosen][rejected]``: the prompt is computed once, and the rejected
answer sees the prompt and itself only, at the positions that follow the prompt.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modern_llm.config import DPOConfig
from modern_llm.data.collate import CHOSEN, PairBatch
from modern_llm.training.objectives import Terms, with_balance_loss


def pair_logprobs(model: nn.Module, batch: PairBatch) -> Tensor:
    """Log-probabilities of both answers given the prompt: ``(B, 2)`` in nats, float32.

    Column 0 is the chosen, 1 the rejected answer; each sums over the answer's tokens, EOS
    included. Only the logits of answer tokens are computed.
    """
    targets = batch.targets()
    logits_MV = model(
        batch.tokens_BT, pos_BT=batch.pos_BT, mask_BTS=batch.mask(), at_M=targets.at_M
    )
    logprob_M = -F.cross_entropy(logits_MV.float(), targets.label_M, reduction="none")
    slot_M = 2 * targets.row_M + targets.rejected_M.long()
    sums = logprob_M.new_zeros(2 * len(batch.tokens_BT)).index_add(0, slot_M, logprob_M)
    return sums.view(-1, 2)


def dpo_loss(margin_B: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Per-pair loss ``(B,)`` of eq. 7; with label smoothing the conservative form of it.

    Args:
        margin_B: policy margin minus reference margin in nats, where a margin is
            ``log p(chosen) - log p(rejected)`` summed over answer tokens.
        beta: strength of the pull to the reference.
        label_smoothing: assumed share of flipped preferences.
    """
    kept_B = -F.logsigmoid(beta * margin_B)
    flipped_B = -F.logsigmoid(-beta * margin_B)
    return (1 - label_smoothing) * kept_B + label_smoothing * flipped_B


def ipo_loss(mean_margin_B: Tensor, *, beta: float) -> Tensor:
    """Per-pair IPO loss ``(B,)`` (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    ``mean_margin_B`` is as in `dpo_loss`, with the mean over each answer's tokens.
    """
    return (mean_margin_B - 1 / (2 * beta)) ** 2


class DPOObjective:
    """Loss and reward metrics of pairs against cached reference log-probabilities.

    Args:
        options: loss, beta and label smoothing.
        reference_P2: ``(pairs, 2)`` log-probabilities of the reference, by index in the store.
    """

    unit = "pair"
    likelihood = False

    def __init__(self, options: DPOConfig, reference_P2: Tensor) -> None:
        self.options = options
        self.reference_P2 = reference_P2

    def units(self, batch: PairBatch) -> int:
        """Number of pairs."""
        return len(batch.index_B)

    def scored(self, batch: PairBatch) -> int:
        """Number of answer tokens."""
        return int((batch.part_BT >= CHOSEN).sum())

    def __call__(self, model: nn.Module, batch: PairBatch) -> Terms:
        """Sum of the pair losses, and sums of accuracy, margin and both rewards."""
        beta = self.options.beta
        reference_B2 = self.reference_P2[batch.index_B.cpu()].to(batch.tokens_BT.device)
        ratio_B2 = pair_logprobs(model, batch) - reference_B2
        if self.options.loss == "ipo":
            length_B2 = torch.stack([(batch.part_BT == part).sum(1) for part in (1, 2)], dim=1)
            mean_B2 = ratio_B2 / length_B2
            loss_B = ipo_loss(mean_B2[:, 0] - mean_B2[:, 1], beta=beta)
        else:
            margin_B = ratio_B2[:, 0] - ratio_B2[:, 1]
            loss_B = dpo_loss(margin_B, beta=beta, label_smoothing=self.options.label_smoothing)
        reward_B2 = beta * ratio_B2.detach()
        margin_B = reward_B2[:, 0] - reward_B2[:, 1]
        metrics = {
            "accuracy": ((margin_B.sign() + 1) / 2).sum(),  # a tie counts one half
            "margin": margin_B.sum(),
            "chosen_reward": reward_B2[:, 0].sum(),
            "rejected_reward": reward_B2[:, 1].sum(),
        }
        return with_balance_loss(model, Terms(loss_B.sum(), metrics), len(loss_B))

    def at_reference(self) -> float:
        """Loss of one pair when the policy is the reference: ln 2, or IPO's squared target."""
        return math.log(2) if self.options.loss == "sigmoid" else 1 / (2 * self.options.beta) ** 2
