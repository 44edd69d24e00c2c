import io
import logging

import pytest
from rich.console import Console

from modern_llm import errors
from modern_llm.runtime import logs
from modern_llm.runtime.logs import counted, get_logger


def test_messages_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log = get_logger("modern_llm.some.part")
    log.info("loss %.2f [not markup]", 1.5)
    log.debug("not shown")
    told = capsys.readouterr()
    assert told.out == ""
    assert "loss 1.50 [not markup]" in told.err
    assert "not shown" not in told.err
    log.warning("%s is damaged", "/long" * 60)
    assert f"WARNING {'/long' * 60} is damaged\n" in capsys.readouterr().err  # one line
    assert get_logger("modern_llm.some.part") is log
    assert log.name == "modern_llm.some.part"
    assert len(logging.getLogger("modern_llm").handlers) == 1


def test_a_long_loop_tells_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(counted(range(1200), "rows", 1200)) == list(range(1200))
    assert capsys.readouterr().err == ""  # it was quick
    monkeypatch.setattr(logs, "LINE_SECONDS", 0.0)
    assert list(counted(iter("ab"), "letters")) == ["a", "b"]
    assert list(counted(["only"], "things", 1)) == ["only"]
    assert list(counted(range(1001), "rows", 1200)) == list(range(1001))
    told = capsys.readouterr().err
    assert "letters: 1\n" in told and "letters: 2\n" in told
    assert "things" not in told
    assert "rows: 1,001 of 1,200\n" in told
    screen = io.StringIO()
    monkeypatch.setattr(logs, "console", Console(force_terminal=True, width=80, file=screen))
    assert list(counted(range(3), "rows", 3)) == [0, 1, 2]
    assert "rows" in screen.getvalue() and "100%" in screen.getvalue()


def test_every_error_has_its_exit_code() -> None:
    codes = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ModernLLMError)
    }
    assert codes == {
        "ModernLLMError": 1,
        "ConfigError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "DivergedError": 5,
        "ProtectedPathError": 6,
        "StoppedBySignal": 75,
    }
