"""A small causal model and a byte tokenizer, written for these tests only."""

import pytest
import torch
from torch import Tensor, nn

VOCAB = 257  # bytes, and BOS


class ToyLM(nn.Module):
    """Logits from a decaying sum over the tokens in view and the position; causal by a loop."""

    def __init__(self, vocab: int = VOCAB, width: int = 16) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(vocab, width, generator=rng))
        self.position = nn.Parameter(torch.randn(64, width, generator=rng))
        self.head = nn.Parameter(torch.randn(width, vocab, generator=rng))
        self.dropout = nn.Dropout(0.5)  # must be off in evaluation
        self.longest = 0
        self.rows = 0

    def forward(self, tokens_BT: Tensor, *, at_M: Tensor) -> Tensor:
        self.longest = max(self.longest, tokens_BT.shape[1])
        self.rows = max(self.rows, tokens_BT.shape[0])
        state_BD = torch.zeros(len(tokens_BT), self.embed.shape[1], dtype=self.embed.dtype)
        states = []
        for t in range(tokens_BT.shape[1]):
            state_BD = 0.8 * state_BD + self.embed[tokens_BT[:, t]] + 0.1 * self.position[t]
            states.append(state_BD)
        hidden_MD = torch.stack(states, dim=1).flatten(0, 1)[at_M]
        return self.dropout(torch.tanh(hidden_MD)) @ self.head


class ByteTokenizer:
    def __init__(self, bos_id: int | None = 256) -> None:
        self.bos_id = bos_id

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture
def toy() -> ToyLM:
    return ToyLM()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def tokenizer_without_bos() -> ByteTokenizer:
    return ByteTokenizer(None)
