"""Plain products of blocks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modern_llm.models.kernels.base import KERNELS, capped


@KERNELS.register("blocks")
class BlockKernel:
    """Plain products, a block of queries at a time against the keys that it can see.

    For bfloat16 on a CPU: torch's fused kernel computes in float32 there and takes two to seven
    times as long, forward and backward. The softmax is in float32, its logits and weights are
    kept in the dtype of the inputs; all T x S weights stay in memory for the backward.
    """

    refuses: tuple[str, ...] = ()
    block_size = 256  # queries; products of fewer are slower than the keys that they spare

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
        n_queries, n_keys = q_BNTH.shape[2], k_BKSH.shape[2]
        blocks = []
        for start in range(0, n_queries, self.block_size):
            end = min(start + self.block_size, n_queries)
            seen = end if is_causal else n_keys
            mask = bias
            if is_causal:
                future = torch.ones(end - start, seen, dtype=torch.bool, device=q_BNTH.device)
                mask = torch.zeros_like(future, dtype=q_BNTH.dtype)
                mask = mask.masked_fill(future.triu(1 + start), float("-inf"))
            elif bias is not None:
                mask = bias[..., start:end, :] if bias.shape[-2] > 1 else bias
                if mask.shape[:-2].numel() == 1:
                    mask = mask.reshape(mask.shape[-2:])
            q_BNLH, k, v = q_BNTH[:, :, start:end], k_BKSH[:, :, :seen], v_BKSH[:, :, :seen]
            blocks.append(self._attend(q_BNLH, k, v, mask, sink_N, dropout, softcap))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)

    def _attend(
        self,
        q_BNLH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        mask: Tensor | None,
        sink_N: Tensor | None,
        dropout: float,
        softcap: float | None,
    ) -> Tensor:
        """One block: the query heads that share keys are rows of one product."""
        shape, n_keys = q_BNLH.shape, k_BKSH.shape[2]
        q_GMH, k_GSH, v_GSH = (
            x.reshape(k_BKSH.shape[0] * k_BKSH.shape[1], -1, shape[-1])
            for x in (q_BNLH, k_BKSH, v_BKSH)
        )
        scale = 1 / math.sqrt(shape[-1])
        if mask is not None and mask.ndim == 2 and not softcap:
            # The same for all rows and heads: added for free.
            mask = mask.to(q_GMH.dtype).repeat(q_GMH.shape[1] // mask.shape[0], 1)
            logit = torch.baddbmm(mask, q_GMH, k_GSH.transpose(1, 2), alpha=scale)
            logit_BNLS = logit.view(*shape[:3], n_keys)
        else:
            logit_BNLS = torch.bmm(q_GMH * scale, k_GSH.transpose(1, 2)).view(*shape[:3], n_keys)
            logit_BNLS = capped(logit_BNLS, softcap)
            if mask is not None:
                logit_BNLS = logit_BNLS + mask.to(logit_BNLS.dtype)
        if sink_N is not None:
            sink_BNL1 = sink_N.to(logit_BNLS)[:, None, None].expand(*shape[:3], 1)
            logit_BNLS = torch.cat([logit_BNLS, sink_BNL1], -1)
        weight_BNLS = logit_BNLS.softmax(-1)[..., :n_keys]
        if dropout:
            weight_BNLS = F.dropout(weight_BNLS, dropout)
        weight_GMS = weight_BNLS.reshape(q_GMH.shape[0], -1, n_keys)
        return torch.bmm(weight_GMS, v_GSH).view(shape)

    def flops(
        self, n_heads: int, head_size: int, n_keys: int, *, sink: bool, is_causal: bool = True
    ) -> float:
        """Two products a block; the causal ones against the keys up to its end."""
        if not is_causal:
            return 4.0 * n_heads * head_size * n_keys
        full, rest = divmod(n_keys, self.block_size)
        pairs = self.block_size**2 * full * (full + 1) / 2 + rest * n_keys
        return 4.0 * n_heads * head_size * pairs / n_keys
