"""Every error that a user of the engine can meet, and nothing else.

    TokenSpeedError
    ├── ConfigError       a setting is wrong; names the field, the value and the bound
    ├── RequestError      one request is wrong; names its field; the engine never sees it
    ├── OverloadedError   the queue is full; try again later
    ├── EngineStopped     the engine is draining or has closed
    ├── RankLost          a rank of the mesh has ended or disagrees; the others end too
    ├── StepError         one step failed; only the requests in it end
    ├── CheckpointError   a model file is missing, corrupt, or of an unknown kind; names the file
    ├── ContractError     what an op is given breaks its contract; names the argument
    ├── KernelError       no backend supports a problem; says what each one lacked
    ├── PlacementError    module boundaries cannot be satisfied on the mesh
    └── SpecError         a TLA+ construct is outside the subset; names file, line and column

Rule: a message says what was given, what was expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContractError",
    "EngineStopped",
    "KernelError",
    "OverloadedError",
    "PlacementError",
    "RankLost",
    "RequestError",
    "SpecError",
    "StepError",
    "TokenSpeedError",
]


class TokenSpeedError(Exception):
    """Root of the tree above."""


class ConfigError(TokenSpeedError, ValueError):
    """A setting cannot be used.

    Args:
        field: the name of the setting, as in the config class.
        value: what was given.
        expected: the bound or the choice of values, and what to do.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: got {value!r}; expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class RequestError(TokenSpeedError, ValueError):
    """One request cannot be served; the message is fit for its sender.

    Args:
        field: the wire name of the offending field (`messages[2].content`), or None.
        message: what was given, what was expected, what to do.
        code: a stable word for programs (`context_length_exceeded`), or None.
    """

    def __init__(self, field: str | None, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.message = message
        self.code = code


class OverloadedError(TokenSpeedError):
    """The waiting queue is at its bound; nothing was lost, try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(TokenSpeedError):
    """The engine is draining or closed and takes no request."""


class RankLost(TokenSpeedError):
    """A rank of the mesh has ended, failed, or computed something else: the mesh cannot go on."""


class StepError(TokenSpeedError):
    """A step raised; the requests that were in it end with this error, the others go on."""


class CheckpointError(TokenSpeedError):
    """A model file cannot be used.

    Args:
        path: the file.
        reason: what is wrong with it, and what to do.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class ContractError(TokenSpeedError, ValueError):
    """An op was given what its contract does not allow.

    Args:
        op: the function.
        argument: which of its arguments.
        given: what it was.
        expected: what the contract says.
    """

    def __init__(self, op: str, argument: str, given: str, expected: str) -> None:
        super().__init__(f"{op}: {argument} is {given}; expected {expected}")
        self.argument = argument


class KernelError(TokenSpeedError):
    """No registered backend can run a problem."""


class PlacementError(TokenSpeedError):
    """Producer and consumer placements cannot be joined on this mesh."""


class SpecError(TokenSpeedError):
    """A TLA+ text is malformed or uses what the compiler does not understand.

    Args:
        path: the module's file.
        line: from 1.
        column: from 1.
        message: the construct, and what to write instead.
    """

    def __init__(self, path: object, line: int, column: int, message: str) -> None:
        super().__init__(f"{path}:{line}:{column}: {message}")
        self.path = path
        self.line = line
        self.column = column
