"""Errors that a user can cause; each has the exit code that the command line returns for it.

Everything else that is raised is a bug and keeps its traceback.
"""


class ModernLLMError(Exception):
    """Base of all errors that are told to the user as one message, without a traceback."""

    exit_code = 1
    told: bool | None = None  # of several ranks: whether another one tells it; None: not known


class ConfigError(ModernLLMError):
    """What was asked for is wrong or cannot be had: preset, field, component, device, launch."""

    exit_code = 2


class DataError(ModernLLMError):
    """Data is missing, empty, malformed, or not what it was when the run began."""

    exit_code = 3


class CheckpointError(ModernLLMError):
    """A checkpoint is missing, torn, altered, unsafe, or of another architecture."""

    exit_code = 4


class DivergedError(ModernLLMError):
    """The loss or a gradient is not finite; the message names the last good checkpoint."""

    exit_code = 5


class ProtectedPathError(ModernLLMError):
    """A result exists and may not be changed, or an output folder cannot be written."""

    exit_code = 6


class PeerError(ModernLLMError):
    """Another rank of the run failed, died, or did not answer in time.

    Args:
        message: what this rank knows of it.
        exit_code: of the rank that failed, which tells the cause itself; this one has no more to
            tell. ``None``: nobody told yet.
    """

    exit_code = 7

    def __init__(self, message: str, *, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.told, self.exit_code = True, exit_code


class StoppedBySignal(ModernLLMError):  # noqa: N818 - a stop is not an error
    """A signal asked the run to stop; a checkpoint was saved and the next start goes on."""

    exit_code = 75
