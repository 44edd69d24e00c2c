"""The verifier: a decoder with a score a token (Cobbe et al. 2021, arXiv:2110.14168)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from modern_llm.config import ModelConfig
from modern_llm.models.cost import Cost
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.linear import Linear
from modern_llm.models.weights import WeightsMixin


class VerifierModel(WeightsMixin):
    """Predicts after each token whether the solution so far will prove right (sec. 4.2, app. E).

    Args:
        config: of the trunk, which is the policy's shape; start it with
            ``verifier.trunk.load_weights(policy.weights())``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = ModernDecoderLM(config)
        self.value_head = Linear(config.d_model, 1, bias=True)
        nn.init.normal_(self.value_head.weight, std=config.init_std)
        nn.init.zeros_(self.value_head.bias)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the trunk; see `ModernDecoderLM.compile`."""
        self.trunk.compile(*args, **kwargs)

    def forward(
        self, tokens_BT: Tensor, *, at_M: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Logits of the next token, and of the solution being right.

        Args:
            tokens_BT: token ids, int64.
            at_M: flat indices into B*T; language-model logits are computed there only.
            **inputs: as in `ModernDecoderLM.forward`.

        Returns:
            Logits ``(B, T, V)`` or ``(M, V)`` in the compute dtype, and ``value_BT`` in float32:
            the score's logit after each token.
        """
        hidden_BTD = self.trunk.hidden(tokens_BT, **inputs)
        value_BT = self.value_head(hidden_BTD).squeeze(-1).float()
        if at_M is not None:
            return self.trunk.logits_at(hidden_BTD, at_M), value_BT
        return self.trunk.logits(hidden_BTD), value_BT

    def score(
        self, tokens_BT: Tensor, lengths_B: Tensor, *, padding: Literal["right", "left"] = "right"
    ) -> Tensor:
        """Score in (0, 1) at the last real token of each row, ``(B,)`` float32.

        Args:
            tokens_BT: question and solution, padded on one side with any id.
            lengths_B: real tokens of each row (int64, at least 1); padding is known by length,
                never by id.
            padding: the side of the padding.
        """
        n_tokens = tokens_BT.shape[1]
        left = padding == "left"
        pad_B = n_tokens - lengths_B if left else None
        hidden_BTD = self.trunk.hidden(tokens_BT, pad_B=pad_B)
        last_B = torch.full_like(lengths_B, n_tokens - 1) if left else lengths_B - 1
        hidden_BD = hidden_BTD[torch.arange(len(lengths_B), device=tokens_BT.device), last_B]
        return self.value_head(hidden_BD).squeeze(-1).float().sigmoid()  # type: ignore[no-any-return]

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
