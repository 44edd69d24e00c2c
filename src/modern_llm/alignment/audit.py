"""The proof, before SFT begins, that the loss falls on answers and their EOS and nowhere else."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from modern_llm.data.collate import IGNORE, TokenBatch
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import DataError

AUDITED_BATCHES = 8
SHOWN_ROWS = 3
SHOWN_TOKENS = 96


def mask_audit(batches: Sequence[TokenBatch], tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """Look at what is supervised in real batches, and refuse what cannot be right.

    Args:
        batches: micro-batches as the objective will see them, with document ids.
        tokenizer: names the tokens.

    Returns:
        Counts for the result, and the text of ``mask_audit.txt``: a few rows with each supervised
        token in brackets.

    Raises:
        DataError: no token or every token is supervised; an example's answer is not supervised
            from its first token to its EOS, or anything else of it is; a label is not the token
            that follows; or padding is supervised.
    """
    total = supervised = documents = 0
    problems: set[str] = set()
    shown: list[str] = []
    for batch in batches[:AUDITED_BATCHES]:
        assert batch.doc_ids_BT is not None
        rows = (batch.tokens_BT.numpy(), batch.labels_BT.numpy(), batch.doc_ids_BT.numpy())
        for tokens, labels, docs in zip(*rows, strict=True):
            real = docs >= 0
            total += int(real.sum())
            supervised += int((labels[real] != IGNORE).sum())
            if (labels[~real] != IGNORE).any():
                problems.add("padding is supervised")
            for doc in np.unique(docs[real]):
                inside = docs == doc
                own_labels, own_tokens = labels[inside], tokens[inside]
                if tokenizer.assistant_id not in own_tokens:
                    continue  # replayed text
                documents += 1
                problems |= _example_problems(own_tokens, own_labels, tokenizer)
            if len(shown) < SHOWN_ROWS:
                shown.append(_marked(tokens[real], labels[real], tokenizer))
    share = supervised / max(total, 1)
    if not 0 < share < 1:
        problems.add(f"the supervised share is {share:.0%}")
    if problems:
        raise DataError(f"SFT mask audit: {'; '.join(sorted(problems))}; nothing was trained")
    facts = {"rows": len(shown), "documents": documents, "tokens": total, "supervised": supervised,
             "share": share}  # fmt: skip
    head = (
        f"supervised tokens: {supervised} of {total} ({share:.1%}) in {documents} examples\n"
        "each token that is learned stands in [brackets]; all others are read only\n"
    )
    return facts, "\n".join([head, *(f"row {i}:\n{text}\n" for i, text in enumerate(shown))])


def _example_problems(
    tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], tokenizer: Tokenizer
) -> set[str]:
    """What is wrong with the labels of one packed example.

    The answer is what follows the last ``<|assistant|>``, whatever the loader believes.
    """
    learned = labels != IGNORE
    if not learned.any():
        return {"an example has no supervised token"}
    before_answer = int(np.flatnonzero(tokens == tokenizer.assistant_id)[-1])
    learnable = np.arange(before_answer, len(tokens) - 1)  # where the answer's tokens are next
    faults = {
        "a prompt token is supervised": learned[:before_answer].any(),
        "the first token of an answer is not supervised": not learned[before_answer],
        "an answer is supervised in part": not learned[learnable].all(),
        "the EOS of an answer is not supervised": labels[-2] != tokenizer.eos_id,
        "a label is not the token that follows": learned[-1]
        or (labels[:-1][learned[:-1]] != tokens[1:][learned[:-1]]).any(),
    }
    return {fault for fault, found in faults.items() if found}


def _marked(
    tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], tokenizer: Tokenizer
) -> str:
    """A row as text, the tokens that are learned in brackets."""
    learned = np.concatenate([[False], labels[:-1] != IGNORE])
    words = [
        f"[{tokenizer.token(int(token))}]" if on else tokenizer.token(int(token))
        for token, on in zip(tokens[:SHOWN_TOKENS], learned[:SHOWN_TOKENS], strict=True)
    ]
    return " ".join(words) + (" ..." if len(tokens) > SHOWN_TOKENS else "")
