"""torch's attention from a function of the logits."""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from modern_llm.errors import ConfigError
from modern_llm.models.kernels.base import KERNELS, AllPairs, capped


@KERNELS.register("flex")
class FlexKernel(AllPairs):
    """``torch.nn.attention.flex_attention``: compiled on a GPU; on a CPU forward only, and slow.

    A learned sink is worked in afterwards, from the logarithm of the softmax's denominator: the
    output times ``sigmoid(lse - sink)``.
    """

    refuses: tuple[str, ...] = ("dropout",)

    def __call__(
        self,
        q_BNTH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        bias: Tensor | None = None,
        *,
        is_causal: bool = False,
        sink_N: Tensor | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        """As in `Kernel`.

        Raises:
            ConfigError: a gradient is wanted on a CPU.
        """
        on_cpu = q_BNTH.device.type == "cpu"
        if on_cpu and torch.is_grad_enabled() and q_BNTH.requires_grad:
            raise ConfigError(
                "model.attention_backend=flex has no backward on a CPU; use auto to train here"
            )
        shape = (q_BNTH.shape[0], q_BNTH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2])
        bias_BNTS = None if bias is None else bias.expand(shape)

        def changed(logit: Tensor, b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
            logit = capped(logit, softcap)
            if is_causal:
                logit = torch.where(s <= t, logit, float("-inf"))
            return logit if bias_BNTS is None else logit + bias_BNTS[b, n, t, s]

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            out_BNTH, aux = _flex(compiled=not on_cpu)(
                q_BNTH,
                k_BKSH,
                v_BKSH,
                score_mod=changed,
                scale=1 / math.sqrt(q_BNTH.shape[-1]),
                enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1],
                return_aux=AuxRequest(lse=True),
            )
        if sink_N is None:
            return out_BNTH  # type: ignore[no-any-return]
        kept_BNT = torch.sigmoid(aux.lse - sink_N.to(aux.lse)[:, None])
        return out_BNTH * kept_BNT.unsqueeze(-1).to(out_BNTH.dtype)  # type: ignore[no-any-return]


@cache
def _flex(*, compiled: bool) -> Callable[..., Any]:
    return torch.compile(flex_attention) if compiled else flex_attention  # type: ignore[return-value]
