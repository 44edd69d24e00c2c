import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modern_llm.errors import ConfigError
from modern_llm.runtime import environment as module
from modern_llm.runtime.environment import check_versions, environment, utc_now

CANARY = "canary-7f3a91"
SECRETS = {
    **{name: f"{CANARY}-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")},
    **{name: f"{CANARY}-user" for name in ("USER", "LOGNAME", "USERNAME")},
    "HOME": f"/home/{CANARY}",
}


def test_environment_holds_no_secret_and_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    told = json.dumps(environment())
    assert CANARY not in told
    assert socket.gethostname() not in told
    assert "HF_TOKEN" not in told


def test_environment_says_what_numbers_were_computed_with() -> None:
    facts = environment()
    json.dumps(facts)
    if facts["git_commit"] is not None:  # tests may run from a copy without history
        assert len(facts["git_commit"]) == 40
        assert isinstance(facts["dirty"], bool)
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["versions"]["torch"].startswith("2.")
    assert facts["hardware"]["cores"] == os.cpu_count()
    assert facts["hardware"]["threads"] >= 1
    assert facts["time"].endswith("+00:00") and len(facts["time"]) == len(utc_now())


def test_an_installed_copy_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment in somebody's repository: that repository's commit is not ours."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    copy = tmp_path / "site-packages" / "environment.py"
    copy.parent.mkdir()
    copy.write_text("")
    monkeypatch.setattr(module, "__file__", str(copy))
    assert environment()["git_commit"] is None
    assert environment()["dirty"] is None


def test_what_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(Path, "read_text", fail)
    facts = environment()
    assert facts["git_commit"] is facts["versions"]["no-such-package"] is None
    assert facts["hardware"]["cpu"]


def test_packages_that_are_too_old_or_missing_are_told_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_versions()  # those of this machine will do
    needed = ["torch>=2.10", "numpy>=1.26", "no-such-thing>=1", 'ruff>=99; extra == "dev"']
    monkeypatch.setattr(module, "requires", lambda name: needed)
    here = {"torch": "2.9.1+cu128", "numpy": "2.0.0rc1"}
    monkeypatch.setattr(module, "_version", here.get)
    with pytest.raises(ConfigError) as told:
        check_versions()
    assert str(told.value) == (
        "torch>=2.10 is needed, here is 2.9.1+cu128; no-such-thing>=1 is needed, here is none: "
        "pip install -r requirements.txt"
    )


def test_a_copy_that_was_not_installed_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> None:
        raise module.PackageNotFoundError(name)

    monkeypatch.setattr(module, "requires", unknown)
    check_versions()
