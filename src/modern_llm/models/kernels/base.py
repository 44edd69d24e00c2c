"""What an attention kernel is, and what several share."""

from typing import Protocol

import torch
from torch import Tensor

from modern_llm.registry import Registry

KERNELS = Registry("attention backend")


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap tanh(logits / softcap)``, or the logits as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Kernel(Protocol):
    """One way to compute attention.

    Attributes:
        refuses: parameters below that it cannot serve, of ``dropout`` and ``softcap``.
    """

    refuses: tuple[str, ...]

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
        """Attention output ``(B, N, T, H)``; K divides N.

        Args:
            q_BNTH: queries.
            k_BKSH: keys.
            v_BKSH: values.
            bias: added to the logits, broadcastable to ``(B, N, T, S)``.
            is_causal: query t sees keys 0..t; only with T = S and no bias.
            sink_N: a learned logit a head that joins the softmax's denominator, has no value
                and is not scaled (gpt-oss, arXiv:2508.10925).
            dropout: probability with which an attention weight is dropped.
            softcap: keeps logits between -softcap and softcap, smoothly, before the bias:
                ``softcap tanh(logit / softcap)`` (Gemma 2, arXiv:2408.00118, sec. 2); the sink's
                logit is not capped.
        """

    def flops(
        self, n_heads: int, head_size: int, n_keys: int, *, sink: bool, is_causal: bool = True
    ) -> float:
        """Forward FLOPs of one query against ``n_keys`` keys, all heads together.

        Args:
            n_heads: N.
            head_size: H.
            n_keys: S.
            sink: whether there is a learned one.
            is_causal: the mean over queries that see keys 0..t of T = S, without bias.
        """


class AllPairs:
    """The FLOPs of a kernel that multiplies every query and every key, hidden or not."""

    def flops(
        self, n_heads: int, head_size: int, n_keys: int, *, sink: bool, is_causal: bool = True
    ) -> float:
        """Two products of S x H a head: logits, and weights times values."""
        return 4.0 * n_heads * head_size * n_keys
