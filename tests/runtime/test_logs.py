import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from modern_llm import errors
from modern_llm.errors import ConfigError
from modern_llm.runtime import logs
from modern_llm.runtime.logs import Trackers, counted, get_logger


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
        "PeerError": 7,
        "StoppedBySignal": 75,
    }


def test_trackers_get_the_numbers_of_a_row(tmp_path: Path) -> None:
    """Read back by TensorBoard's own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = Trackers(["tensorboard"], folder=tmp_path, run="trackers")
    for step in (1, 2):
        row = {"step": step, "loss": 3.0 / step, "note": "text", "mfu": None}
        trackers.log("train", row)
    trackers.close()
    events = reader.EventAccumulator(str(tmp_path / "trackers"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 1.5)]


def test_no_trackers_write_nothing(tmp_path: Path) -> None:
    trackers = Trackers([], folder=tmp_path, run="trackers")
    trackers.log("train", {"step": 1, "loss": 2.0})
    trackers.close()
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install nowhere_to_be_found"):
        Trackers(["nowhere_to_be_found"], folder=tmp_path, run="trackers")
