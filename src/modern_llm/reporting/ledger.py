"""The ledger: every score of every run, one JSON line each, append-only and never twice.

A row says where a number comes from: run, stage, commit, config, data, seed, versions, protocol.
``git_commit`` is that of the code that trained the checkpoint, ``evaluated_with`` that of the code
that computed the score; ``dirty``, ``versions``, ``seed`` and ``ended`` belong to the latter.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modern_llm.errors import ConfigError
from modern_llm.reporting.fields import read_rows
from modern_llm.reporting.gains import evaluated_scores, scored_stages
from modern_llm.reporting.results import read_run
from modern_llm.reporting.values import Provenance, Run, Score
from modern_llm.runtime.artifacts import JsonLines, sha256_json
from modern_llm.runtime.files import locked

WAIT_S = 60.0  # for another process that is writing its rows


def record_scores(run: Path, ledger: Path) -> int:
    """Append the scores of a run that the ledger does not have yet.

    Args:
        run: run folder.
        ledger: JSON-lines file, made when it is missing.

    Returns:
        Number of rows written.

    Raises:
        DataError: ``run`` is no run folder.
        ConfigError: another process has held the ledger for a minute.
        ProtectedPathError: the ledger cannot be written.
    """
    rows = list(score_rows(read_run(run)))
    with _waiting_lock(ledger.parent):
        known = {json.dumps(row, sort_keys=True) for row in read_rows(ledger, ledger.name, [])}
        new = [row for row in rows if json.dumps(row, sort_keys=True) not in known]
        if new:
            file = JsonLines(ledger)
            for row in new:
                file.append(row)
    return len(new)


def score_rows(run: Run) -> Iterator[dict[str, Any]]:
    """One row for every score of a run's models and baselines."""
    evaluated = run.evaluation.provenance
    for name in scored_stages(run):
        scored = run.evaluation.sha256(name)
        for score in evaluated_scores(run, name):
            yield _row(run, name, evaluated, score, scored)
        if stage := run.stages.get(name):
            made = stage.checkpoint.sha256 if stage.checkpoint else ""
            for score in stage.scores:
                yield _row(run, name, stage.provenance, score, made)
    for name, scores in run.evaluation.baselines:
        for score in scores:
            yield _row(run, f"baseline:{name}", evaluated, score, "")


def data_hash(run: Run, stage: str) -> str:
    """Hash of the fingerprints of all sources of a stage; empty without any."""
    rows = run.stages[stage].data if stage in run.stages else ()
    return sha256_json([[r.source, r.split, r.fingerprint] for r in rows]) if rows else ""


def _row(
    run: Run, stage: str, told: Provenance, score: Score, checkpoint_sha256: str
) -> dict[str, Any]:
    """One row; ``told`` is what the score was computed with."""
    trained = run.stages[stage].provenance.git_commit if stage in run.stages else ""
    return {
        "run": run.name,
        "stage": stage,
        "git_commit": trained or told.git_commit,
        "dirty": told.dirty,
        "evaluated_with": told.git_commit,
        "config_sha256": told.config_sha256,
        "seed": told.seed,
        "versions": told.versions,
        "ended": told.ended,
        "protocol": score.key,
        "metric": score.metric,
        "value": score.value,
        "ci95": list(score.ci95) if score.ci95 else None,
        "n": score.n,
        "note": score.note,
        "checkpoint_sha256": checkpoint_sha256,
        "data_sha256": data_hash(run, stage),
    }


@contextmanager
def _waiting_lock(folder: Path) -> Iterator[None]:
    """Like `files.locked`, but wait: ledgers are shared between runs, and quick to write."""
    deadline = time.monotonic() + WAIT_S
    while True:
        lock = locked(folder)
        try:
            lock.__enter__()
            break
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
