"""Every error a user can put right, with its hint.

    InspectorError
    ├── ModelError         a file that is not a model we can read, or two models that do not fit
    ├── FeedError          inputs that do not fit the model
    ├── RunError           the runtime refused a model or a feed, or a worker process ended
    ├── CalibrationError   ranges that cannot be observed on these feeds
    ├── QuantizationError  the quantizer refused, or wrote a file that does not load
    ├── ExclusionError     an exclusion list that does not fit the model
    ├── ReportError        a result that cannot be written or read
    ├── QuotaError         more than one user of a portal may store
    └── SettingError       a server's setting that cannot be used

A message names the thing, what was found and what was expected. The hint is one imperative
sentence that works when followed. Misuse by a caller stays ValueError or TypeError.
"""

from __future__ import annotations


class InspectorError(Exception):
    """An error a user can put right.

    Args:
        message: names the thing, what was found and what was expected.
        hint: one imperative sentence that works when followed.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross the process border between worker and caller; `hint` is keyword-only.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[InspectorError], message: str, hint: str) -> InspectorError:
    return kind(message, hint=hint)


class ModelError(InspectorError):
    """A file that is not a model we can read, or two models that do not fit each other."""


class FeedError(InspectorError):
    """Inputs that do not fit the model."""


class RunError(InspectorError):
    """The runtime refused a model or a feed, or the worker process ended."""


class CalibrationError(InspectorError):
    """Ranges that cannot be observed on these feeds."""


class QuantizationError(InspectorError):
    """The quantizer refused, or wrote a file that does not load."""


class ExclusionError(InspectorError):
    """An exclusion list that does not fit the model."""


class ReportError(InspectorError):
    """A result that cannot be written or read."""


class QuotaError(InspectorError):
    """More than one user of a portal may store."""


class SettingError(InspectorError):
    """A server's setting that cannot be used."""


class Cancelled(Exception):
    """Raised inside long work when its owner asked it to stop. Not an error: nothing is wrong."""
