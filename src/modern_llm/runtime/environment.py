"""What a result was computed with: commit, versions, hardware. No environment variables."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from modern_llm.errors import ConfigError

PACKAGES = (
    "torch", "transformers", "datasets", "tokenizers", "accelerate", "evaluate", "safetensors",
    "pydantic", "numpy",
)  # fmt: skip


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_versions() -> None:
    """Refuse packages other than this one is made for, such as those of a cluster's own Python.

    A copy that was not installed does not say what it needs, and is not checked.

    Raises:
        ConfigError: names each package, what is here and what is needed.
    """
    try:
        needed = [Requirement(text) for text in requires("modern_llm") or []]
    except PackageNotFoundError:
        return
    problems = []
    for need in needed:
        here = _version(need.name)
        optional = need.marker is not None
        if not optional and (here is None or not need.specifier.contains(here, prereleases=True)):
            problems.append(f"{need.name}{need.specifier} is needed, here is {here or 'none'}")
    if problems:
        raise ConfigError(f"{'; '.join(problems)}: pip install -r requirements.txt")


def cpu_name() -> str:
    """Model of the CPU as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def utc_now() -> str:
    """Time in UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Commit, versions and hardware of this process; holds no host name and no user name."""
    tracked = _git("ls-files", "--error-unmatch", __file__) is not None  # not an installed copy
    status = _git("status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "git_commit": _git("rev-parse", "HEAD") if tracked else None,
        "dirty": None if status is None else bool(status),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "hardware": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": [
                torch.cuda.get_device_name(i)
                for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            ],
        },
        "time": utc_now(),
    }
