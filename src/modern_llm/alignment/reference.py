"""Log-probabilities of the frozen reference for all pairs of a store: one pass, cached."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from modern_llm.data.collate import PairBatch, collate_pairs
from modern_llm.data.store import TokenStore
from modern_llm.runtime.artifacts import sha256_json, write_bytes
from modern_llm.runtime.devices import autocast
from modern_llm.runtime.logs import counted, get_logger

log = get_logger(__name__)


def reference_logprobs(
    model: Callable[[], nn.Module],
    logprobs: Callable[[nn.Module, PairBatch], Tensor],
    store: TokenStore,
    *,
    model_sha256: str,
    cache_dir: Path,
    batch_size: int,
    precision: str,
) -> Tensor:
    """``(pairs, 2)`` log-probabilities in nats of chosen and rejected answers, float32.

    Args:
        model: makes the reference; called only when the values are not cached.
        logprobs: ``(model, batch) -> (B, 2)``.
        store: the pairs; its fingerprint is part of the cache's key.
        model_sha256: hash of the reference's checkpoint, the other part.
        cache_dir: the values lie below ``reference/``.
        batch_size: pairs of one forward pass.
        precision: of the forward pass.
    """
    key = sha256_json([model_sha256, store.fingerprint, precision])
    path = cache_dir / "reference" / f"{key}.npz"
    if path.exists():
        cached = _read(path, rows=len(store))
        if cached is not None:
            log.info("reference log-probabilities of %d pairs: from the cache", len(store))
            return cached
        log.warning("%s is damaged; computed again", path)
    reference = model()
    device = next(reference.parameters()).device
    order = np.argsort(store.lengths().sum(axis=1), kind="stable")
    values = np.empty((len(store), 2), dtype=np.float32)
    with torch.inference_mode(), autocast(device, precision):
        starts = range(0, len(order), batch_size)
        for start in counted(starts, "reference log-probabilities, batches", len(starts)):
            rows = order[start : start + batch_size]
            batch = collate_pairs(store, rows).to(device)
            values[rows] = logprobs(reference, batch).cpu().numpy()
    buffer = BytesIO()
    np.savez(buffer, logprobs=values)  # an archive carries a checksum
    write_bytes(path, buffer.getvalue(), on_exists="replace" if path.exists() else "skip")
    return torch.from_numpy(values)


def _read(path: Path, *, rows: int) -> Tensor | None:
    """The cached values; ``None`` when they are not what was written."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            values = archive["logprobs"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    good = values.shape == (rows, 2) and values.dtype == np.float32 and np.isfinite(values).all()
    return torch.from_numpy(values) if good else None
