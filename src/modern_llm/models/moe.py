"""Mixture of experts: a router sends each token to its top-k feed-forwards."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modern_llm.config import ModelConfig, MoEConfig
from modern_llm.models.cost import Cost
from modern_llm.models.dims import Dims
from modern_llm.models.ffn import FFNS
from modern_llm.models.linear import GroupedLinear, Linear


class Routing(NamedTuple):
    """How one layer routed the tokens of one forward.

    Attributes:
        load_E: share of the token-to-expert assignments that each expert got; sums to 1.
        prob_E: mean router probability of each expert over the full softmax; has the gradient.
    """

    load_E: Tensor  # noqa: N815 - shape suffix
    prob_E: Tensor  # noqa: N815

    def balance_loss(self) -> Tensor:
        """``E sum_e load_e prob_e``: 1 when balanced (arXiv:2101.03961, eq. 4-6, without alpha)."""
        return self.load_E.shape[0] * (self.load_E * self.prob_E).sum()


class MoE(nn.Module):
    """Top-k mixture of experts (arXiv:1701.06538), gates renormalised over the k chosen.

    With one expert a token the gate is its probability (arXiv:2101.03961, eq. 2): renormalised it
    would be 1 whatever the router says, and the router would learn nothing from the loss.

    Experts are one feed-forward of the registry whose matrices are stacked; tokens are sorted by
    expert and none is dropped.

    Args:
        config: names the feed-forward of the experts.
        dims: sizes; each expert has width ``d_ff``.
        moe: number of experts and ``top_k``.
    """

    def __init__(self, config: ModelConfig, dims: Dims, moe: MoEConfig) -> None:
        super().__init__()
        self.n_experts, self.top_k = moe.n_experts, moe.top_k
        self.router = Linear(dims.d_model, moe.n_experts, bias=False)
        linear = partial(GroupedLinear, moe.n_experts)
        self.experts = FFNS.build(config.ffn, dims, config.activation, linear)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """Mixture output ``(B, T, D)`` and how the tokens were routed."""
        x_MD = x_BTD.flatten(0, -2)
        prob_ME = self.router(x_MD).float().softmax(-1)
        gate_MK, expert_MK = prob_ME.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            gate_MK = gate_MK / gate_MK.sum(-1, keepdim=True)

        chosen_ME = torch.zeros_like(prob_ME).scatter_(1, expert_MK, 1.0)
        counts_E = chosen_ME.sum(0).long()
        order = expert_MK.flatten().argsort(stable=True)  # assignments, sorted by expert
        token = order // self.top_k
        y = self.experts(x_MD[token], counts_E)
        y = y * gate_MK.flatten()[order].unsqueeze(-1).to(y.dtype)
        out_MD = torch.zeros_like(x_MD, dtype=y.dtype).index_add(0, token, y)
        routing = Routing(counts_E / order.shape[0], prob_ME.mean(0))
        return out_MD.view_as(x_BTD), routing

    def cost(self, seq_len: int) -> Cost:
        """All experts are stored, ``top_k`` of them are used by a token."""
        router = self.router.weight.numel()
        stored = self.experts.cost(seq_len)
        active = stored.params * self.top_k // self.n_experts
        parts = {
            "router": self.router.flops(),
            "experts": stored.flops_per_token_forward * self.top_k,
        }
        return Cost(router + stored.params, router + active, 0, sum(parts.values()), parts)
