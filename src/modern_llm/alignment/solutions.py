"""Graded solutions: what a verifier learns from them, and the scores that it gives."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modern_llm.data.collate import AnswerBatch
from modern_llm.data.prepare import solution_ids
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.models import VerifierModel
from modern_llm.runtime.devices import autocast
from modern_llm.runtime.logs import counted
from modern_llm.training.objectives import Terms, with_balance_loss


class VerifierObjective:
    """Correctness at every answer token, and the language-model loss of right solutions beside it.

    The label of a solution is the target of each of its tokens, so that the score is trained all
    along the solution; the score that is used is the one at the last token. Wrong solutions are
    no text to imitate, so they have no language-model loss.

    Args:
        lm_coef: weight of the language-model loss.
    """

    unit = "token"
    likelihood = False

    def __init__(self, lm_coef: float) -> None:
        self.lm_coef = lm_coef

    def units(self, batch: AnswerBatch) -> int:
        """Number of answer tokens, EOS included."""
        return int(batch.answer_BT.sum())

    def scored(self, batch: AnswerBatch) -> int:
        """The same: the head computes at answers only."""
        return self.units(batch)

    def __call__(self, model: nn.Module, batch: AnswerBatch) -> Terms:
        """Sums over answer tokens of the correctness loss and the weighted LM loss."""
        value_M, logprob_M = model(batch.tokens_BT, batch.answer_BT)
        label_M = batch.label_B[:, None].expand_as(batch.answer_BT)[batch.answer_BT]
        value_sum = F.binary_cross_entropy_with_logits(value_M, label_M, reduction="sum")
        lm_sum = -(logprob_M * label_M).sum()
        metrics = {
            "value_loss": value_sum.detach(),
            "lm_loss": lm_sum.detach(),
            "token_accuracy": ((value_M > 0) == (label_M > 0.5)).float().sum(),
        }
        terms = Terms(value_sum + self.lm_coef * lm_sum, metrics)
        return with_balance_loss(model, terms, batch.answer_BT.sum())


def score_solutions(
    model: VerifierModel,
    tokenizer: Tokenizer,
    solutions: Sequence[tuple[str, str]],
    *,
    batch_size: int,
    precision: str,
    max_tokens: int | None = None,
) -> list[float]:
    """Verifier's score in (0, 1) of each ``(question, solution)``.

    Rows are sorted by length and padded on the right, which a score does not see.

    Args:
        model: in eval mode.
        tokenizer: the policy's.
        solutions: as for `solution_ids`; one that does not fit cannot be judged and scores 0.
        batch_size: rows of one forward pass.
        precision: of the forward pass.
        max_tokens: of question and solution together; default: the model's context.
    """
    limit = max_tokens or model.config.max_seq_len
    rows: dict[int, Tensor] = {}
    answers: dict[int, Tensor] = {}  # which ids are the solution's
    for i, row in enumerate(solution_ids(tokenizer, solutions, max_tokens=limit)):
        if row is not None:
            question, answer = row
            rows[i] = torch.tensor([*question, *answer])
            answers[i] = torch.arange(len(rows[i])) >= len(question)
    device = next(model.parameters()).device
    order = sorted(rows, key=lambda i: len(rows[i]))
    scores = [0.0] * len(solutions)
    with torch.inference_mode(), autocast(device, precision):
        starts = range(0, len(order), batch_size)
        for start in counted(starts, "scoring solutions, batches", len(starts)):
            chunk = order[start : start + batch_size]
            tokens_BT = pad_sequence([rows[i] for i in chunk], batch_first=True)
            answer_BT = pad_sequence([answers[i] for i in chunk], batch_first=True)
            score_B = model.score(tokens_BT.to(device), answer_BT.to(device))
            for i, score in zip(chunk, score_B.tolist(), strict=True):
                scores[i] = score
    return scores
