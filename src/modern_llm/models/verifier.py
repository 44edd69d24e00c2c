"""The verifier: a decoder with a score a token (Cobbe et al. 2021, arXiv:2110.14168)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modern_llm.config import ModelConfig
from modern_llm.models.cost import Cost
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.initialize import draw_normal
from modern_llm.models.linear import Linear
from modern_llm.models.weights import WeightsMixin


class VerifierModel(WeightsMixin):
    """Predicts after each token of a solution whether it will prove right (sec. 4.2, app. E).

    The score's logit is linear in the hidden state, as in the source, plus the log-probability of
    the least likely token of the solution so far, under the trunk's own language model. What
    predicts a token is at the top of the trunk one position earlier, where no later position can
    attend to it; so the score is told how well each prediction came true, and a slip shows.

    Args:
        config: of the trunk, which is the policy's shape; start it with
            ``verifier.trunk.load_weights(policy.weights())``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = ModernDecoderLM(config)
        self.value_head = Linear(config.d_model, 1, bias=True)
        nn.init.zeros_(self.value_head.bias)
        self._draw_head()

    @torch.no_grad()
    def _draw_head(self) -> None:
        draw_normal(self.value_head.weight, std=self.config.init_std)

    def initialize_again(self) -> None:
        """As in `ModernDecoderLM`."""
        self.trunk.initialize_again()
        self._draw_head()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the trunk; see `ModernDecoderLM.compile`."""
        self.trunk.compile(*args, **kwargs)

    def forward(self, tokens_BT: Tensor, answer_BT: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Value and log-probability of each of the M answer tokens, row after row.

        Args:
            tokens_BT: token ids, int64, padded on the right with any id.
            answer_BT: bool, True on the tokens of the solution; a row begins with a question.
            **inputs: as in `ModernDecoderLM.forward`.

        Returns:
            ``value_M``, the score's logit after each token, and ``logprob_M``, the token's nats
            under the trunk; both float32.
        """
        hidden_BTD = self.trunk.hidden(tokens_BT, **inputs)
        at_M = answer_BT.flatten().nonzero().squeeze(1)
        logits_MV = self.trunk.logits_at(hidden_BTD, at_M - 1)  # a token is predicted one earlier
        tokens_M = tokens_BT.flatten()[at_M]
        logprob_M = -F.cross_entropy(logits_MV.float(), tokens_M, reduction="none")
        head_M = self.value_head(hidden_BTD.flatten(0, 1)[at_M]).squeeze(-1).float()
        return head_M + least_so_far(logprob_M, answer_BT), logprob_M

    def score(self, tokens_BT: Tensor, answer_BT: Tensor) -> Tensor:
        """Score in (0, 1) at the last token of each row's solution, ``(B,)`` float32.

        Args:
            tokens_BT: question and solution, padded on the right with any id.
            answer_BT: bool, True on the tokens of the solution; at least one a row.
        """
        value_M, _ = self(tokens_BT, answer_BT)
        last_B = answer_BT.sum(dim=1).cumsum(0) - 1
        return value_M[last_B].sigmoid()  # type: ignore[no-any-return]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in `ModernDecoderLM`."""
        self.trunk.set_activation_checkpointing(enabled)

    def aux_loss(self) -> Tensor | None:
        """Balance loss of the trunk's last forward."""
        return self.trunk.aux_loss()

    def moe_load(self) -> dict[str, Tensor]:
        """Loads of the trunk's experts in the last forward."""
        return self.trunk.moe_load()

    def cost(self, seq_len: int) -> Cost:
        """The trunk, and the scalar head."""
        count = sum(p.numel() for p in self.value_head.parameters())
        flops = self.value_head.flops()
        return self.trunk.cost(seq_len) + Cost(count, count, 0, flops, {"value head": flops})


def least_so_far(logprob_M: Tensor, answer_BT: Tensor) -> Tensor:
    """Smallest log-probability of a solution up to each of its tokens, ``(M,)``.

    Args:
        logprob_M: nats of each answer token, row after row.
        answer_BT: bool, True on the M answer tokens.
    """
    logprob_BT = logprob_M.new_zeros(answer_BT.shape).masked_scatter(answer_BT, logprob_M)
    return logprob_BT.cummin(dim=1).values[answer_BT]  # the zeros around a solution are no smaller
