"""The equation, written out."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modern_llm.models.kernels.base import KERNELS, AllPairs, capped


@KERNELS.register("manual")
class ManualKernel(AllPairs):
    """Written out, with logits and softmax in float32; holds all T x S logits in memory."""

    refuses: tuple[str, ...] = ()

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
        """As in `Kernel`."""
        group = q_BNTH.shape[1] // k_BKSH.shape[1]
        k_BNSH, v_BNSH = (
            x.repeat_interleave(group, 1) if group > 1 else x for x in (k_BKSH, v_BKSH)
        )
        logit_BNTS = (q_BNTH / math.sqrt(q_BNTH.shape[-1])) @ k_BNSH.transpose(-2, -1)
        if logit_BNTS.dtype is not torch.float64:
            logit_BNTS = logit_BNTS.float()
        logit_BNTS = capped(logit_BNTS, softcap)
        if is_causal:
            future = torch.ones_like(logit_BNTS[0, 0], dtype=torch.bool).triu(1)
            logit_BNTS = logit_BNTS.masked_fill(future, float("-inf"))
        if bias is not None:
            logit_BNTS = logit_BNTS + bias
        n_keys = logit_BNTS.shape[-1]
        if sink_N is not None:
            sink_BNT1 = sink_N.to(logit_BNTS)[:, None, None].expand(*logit_BNTS.shape[:-1], 1)
            logit_BNTS = torch.cat([logit_BNTS, sink_BNT1], -1)
        weight_BNTS = logit_BNTS.softmax(-1)[..., :n_keys].to(v_BNSH.dtype)
        if dropout:
            weight_BNTS = F.dropout(weight_BNTS, dropout)
        return weight_BNTS @ v_BNSH
