"""What is measured of one arm: losses by position, memory, time, attention, a long text."""

import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modern_llm.data.tokenizer import Tokenizer
from modern_llm.experiments.sinks.arms import Arm
from modern_llm.experiments.sinks.scores import bin_edges, bin_means
from modern_llm.experiments.sinks.stream import (
    attention_shares,
    cache_bytes,
    compose,
    position_nats,
)
from modern_llm.models import ModernDecoderLM
from modern_llm.models.generate import Sampling

FORMAT = 1  # raised when the same models give other numbers
ROWS = 64  # texts read at a time
PROMPT_TOKENS = 16  # of the first text; what follows is written by the model
TEMPERATURE = 0.8


def measure(
    model: ModernDecoderLM,
    arm: Arm,
    texts_NT: Tensor,
    tokenizer: Tokenizer,
    *,
    context: int,
    n_first: int,
) -> dict[str, Any]:
    """Numbers of one arm and one seed, plain enough for JSON.

    Args:
        model: stretched to the texts' length.
        arm: what its cache keeps.
        texts_NT: whole contexts and one token more.
        tokenizer: of the model.
        context: tokens that it was trained on.
        n_first: tokens whose share of the attention is told.

    Returns:
        ``bin_nats`` (nats per token of each text in each bin), ``cache_tokens`` and
        ``cache_bytes`` at the end of a text, ``seconds_per_token`` (medians of the first and the
        last context, one text at a time), ``attention`` (see `attention_shares`), ``sample``.
    """
    n_tokens = texts_NT.shape[1] - 1
    nats = [
        position_nats(model, rows_BT, arm.new_cache(model, len(rows_BT), n_tokens)).numpy()
        for rows_BT in torch.split(texts_NT, ROWS)
    ]
    means_NK = bin_means(np.concatenate(nats), bin_edges(context, n_tokens // context))
    prompt = texts_NT[0, : min(PROMPT_TOKENS, context // 2)].tolist()
    held = min(n_tokens, arm.capacity or n_tokens)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products of one token are bound by memory
    try:
        written, seconds = compose(
            model, prompt, n_tokens - len(prompt), arm.new_cache(model, 1, n_tokens),
            sampling=Sampling(TEMPERATURE, n_vocab=tokenizer.n_vocab), seed=0,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return {
        "kind": arm.kind,
        "label": arm.label,
        "bin_nats": means_NK.tolist(),
        "cache_tokens": held,
        "cache_bytes": cache_bytes(model, held),
        "seconds_per_token": {
            "first": statistics.median(seconds[1:context]),  # the first step reads the prompt
            "last": statistics.median(seconds[-context:]),
        },
        "attention": attention_shares(model, texts_NT[:ROWS, :context], n_first=n_first),
        "sample": {
            "prompt": tokenizer.decode(prompt, skip_special=False),
            "text": tokenizer.decode(written, skip_special=False),
            "prompt_tokens": len(prompt),
            "tokens": len(written),
            "temperature": TEMPERATURE,
        },
    }
