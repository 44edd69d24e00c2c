"""Training of one model of the study, in a process of its own: the pipeline's own stage."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modern_llm import errors
from modern_llm.config import PipelineConfig
from modern_llm.experiments.sinks.arms import TRAINED
from modern_llm.runtime.artifacts import sha256_json, write_text

ERRORS = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.ModernLLMError)
}


def cell_of(config: PipelineConfig, kind: str, seed: int) -> PipelineConfig:
    """Config of one model: ``config`` with the kind's attention, its seed, and its own name.

    The name ends in a hash of all that decides the weights: another config is another run.
    """
    raw: dict[str, Any] = config.model_dump(mode="json")
    raw["model"] |= TRAINED[kind]
    raw["seed"] = raw["pretrain"]["training"]["seed"] = seed
    cell = PipelineConfig.model_validate(raw)
    decides = sha256_json(
        {"model": raw["model"], "tokenizer": raw["tokenizer"], "pretrain": raw["pretrain"]}
    )
    return cell.model_copy(update={"name": f"{kind}-seed{seed}-{decides[:8]}"})


def train(
    config: PipelineConfig, out: Path, *, plugins: Sequence[Path] = (), force: bool = False
) -> Path:
    """Pretrain in a process of its own; a finished run stands, an unfinished one goes on.

    Args:
        config: its name is that of the run.
        out: folder of runs.
        plugins: files that register components.
        force: train again; a backup is kept.

    Returns:
        The final checkpoint, ``<out>/<name>/pretrain/final``.

    Raises:
        ModernLLMError: the error of the run, which has told its message.
    """
    stage = out / config.name / "pretrain"
    if (stage / "result.json").is_file() and not force:
        return stage / "final"
    file = out / f"{config.name}.json"
    write_text(file, f"{config}\n", on_exists="replace" if force else "skip")
    command = [
        *(sys.executable, "-m", "modern_llm", "run", "--stage", "pretrain", "--no-report"),
        *("--config", str(file), "--output-dir", str(out), "--run-name", config.name),
        *(word for plugin in plugins for word in ("--plugin", str(plugin))),
        *(["--force"] if force else []),
    ]
    code = _run(command)
    if code:
        raise ERRORS.get(code, errors.ModernLLMError)(
            f"training of {config.name} ended with exit code {code}; its message is above, "
            f"its config is {file}"
        )
    return stage / "final"


def _run(command: Sequence[str]) -> int:
    """Exit code of a command; when this process is stopped, so is the other, which saves first."""
    # In a session of its own, so that Ctrl-C reaches it once: a second would end it at once.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
