"""One forward pass, as far as its memory depends on it."""

from dataclasses import dataclass

FP32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Pass:
    """One forward pass of a micro-batch.

    Attributes:
        rows: of the micro-batch.
        seq_len: tokens of a row.
        number: bytes of a number in matrix products.
        on_gpu: kernels of CUDA, else those of a CPU.
        masked: a mask hides more than the future: documents in a row, preference pairs.
        dropout: it is in training mode, with dropout if the model has any.
        scored: tokens at which the head computes; ``None``: all.
        loss_chunk: tokens whose logits stand at once; 0: all.
    """

    rows: int
    seq_len: int
    number: int = FP32
    on_gpu: bool = True
    masked: bool = False
    dropout: bool = True
    scored: int | None = None
    loss_chunk: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, padding counted."""
        return self.rows * self.seq_len

    @property
    def casts(self) -> bool:
        """Whether autocast copies what matrix products read."""
        return self.number < FP32


def dropped(step: Pass, count: float, number: int) -> float:
    """The mask of a dropout: a byte on a GPU, a factor in its input's dtype on a CPU."""
    return count * (1 if step.on_gpu else number)
