import logging

import pytest

from modern_llm import errors
from modern_llm.runtime.logs import get_logger


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
