"""How fast a decoder generates: reading the prompt, then one token at a time with a cache."""

import statistics
import time
from dataclasses import dataclass

import torch

from modern_llm.errors import ConfigError
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.devices import autocast

BATCH, PROMPT_TOKENS, NEW_TOKENS = 1, 128, 32
REPEATS, MAX_SECONDS = 5, 2.0
MIN_CONTEXT = 3  # tokens: a prompt of one, a first and a further token


@dataclass(frozen=True)
class Speed:
    """Medians over repeats, greedy, with a cache; rows are of one length and never end early.

    Attributes:
        batch_size: rows at once.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens made for each row; fewer than asked for where time was short.
        repeats: times that it was done, after one to warm up.
        precision: of the matrix products; weights stay as they are.
        device: where it ran.
        threads: CPU threads of torch.
        prefill_tokens_per_s: prompt tokens of all rows, a second.
        decode_tokens_per_s: new tokens of all rows after the first, a second.
        first_token_s: from the prompt to the first token of all rows, in seconds.
        token_s: for each further token of all rows.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    precision: str
    device: str
    threads: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    token_s: float


@torch.no_grad()
def measure_speed(
    model: ModernDecoderLM,
    *,
    batch_size: int = BATCH,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    precision: str = "fp32",
    repeats: int = REPEATS,
    max_seconds: float = MAX_SECONDS,
) -> Speed:
    """Time generation; the mode is put back, the random state is not touched.

    Args:
        model: a decoder, where it is to run.
        batch_size: rows at once, each with a prompt of its own.
        prompt_tokens: default: 128, or half of a shorter context.
        new_tokens: 2 at least; default: 32, or what the context has room for.
        precision: of autocast.
        repeats: measured at most this often.
        max_seconds: no repeat and no further token begins later; two tokens are always made.

    Raises:
        ConfigError: the tokens exceed the context, or there are too few to time.
    """
    n_prompt, n_new = _lengths(model.config.max_seq_len, prompt_tokens, new_tokens)
    device = model.embedding.weight.device
    count = torch.arange(batch_size * n_prompt, device=device).reshape(batch_size, n_prompt)
    prompt_BT = count % model.config.vocab_size
    was_training = model.training
    model.eval()
    try:
        with autocast(device, precision):
            _generate(model, prompt_BT, 2, end=0.0)
            runs: list[list[float]] = []
            end = time.perf_counter() + max_seconds
            while len(runs) < repeats and (not runs or time.perf_counter() < end):
                runs.append(_generate(model, prompt_BT, n_new, end=end))
    finally:
        model.train(was_training)
    first_s = statistics.median(run[0] for run in runs)
    token_s = statistics.median(seconds for run in runs for seconds in run[1:])
    return Speed(
        batch_size=batch_size,
        prompt_tokens=n_prompt,
        new_tokens=max(map(len, runs)),
        repeats=len(runs),
        precision=precision,
        device=str(device),
        threads=torch.get_num_threads(),
        prefill_tokens_per_s=batch_size * n_prompt / first_s,
        decode_tokens_per_s=batch_size / token_s,
        first_token_s=first_s,
        token_s=token_s,
    )


def _lengths(limit: int, prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Tokens of the prompt and new ones; ``None`` takes what fits into ``limit``."""
    n_prompt = min(PROMPT_TOKENS, limit // 2) if prompt_tokens is None else prompt_tokens
    n_new = min(NEW_TOKENS, limit - n_prompt) if new_tokens is None else new_tokens
    if n_prompt < 1 or n_new < 2 or n_prompt + n_new > limit:
        raise ConfigError(
            f"a prompt of {n_prompt} and {n_new} new tokens cannot be timed in a context of "
            f"max_seq_len={limit}; give one token or more, and two or more new ones"
        )
    return n_prompt, n_new


def _generate(
    model: ModernDecoderLM, tokens_BT: torch.Tensor, n_new: int, *, end: float
) -> list[float]:
    """Seconds of each of ``n_new`` tokens, of fewer from the time ``end`` on, of two at least."""
    n_rows, n_prompt = tokens_BT.shape
    cache = model.new_cache(n_rows, n_prompt + n_new)
    seconds: list[float] = []
    _wait(tokens_BT.device)
    begin = time.perf_counter()
    while len(seconds) < n_new and (len(seconds) < 2 or begin < end):
        hidden_BD = model.hidden(tokens_BT, cache=cache)[:, -1]
        tokens_BT = model.logits(hidden_BD).argmax(-1, keepdim=True)
        _wait(tokens_BT.device)
        now = time.perf_counter()
        seconds.append(now - begin)
        begin = now
    return seconds


def _wait(device: torch.device) -> None:
    """Let a GPU finish: its work is only queued by the calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
