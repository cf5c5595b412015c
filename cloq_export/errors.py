"""One error family: every mistake a user can make ends in one of these, said in one line with its remedy."""

from __future__ import annotations


class CloqError(Exception):
    """Base of every error that this package raises on purpose.

    The message says what was seen, what is allowed and what to do next. The command line prints it without a
    traceback and ends with `exit_code`.
    """

    exit_code = 1


class UsageError(CloqError):
    """An option or a combination of options that makes no sense; exit code 2."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe names an unknown option or gives it a value that is not allowed."""


class GateMissedError(CloqError):
    """A measured figure misses the gate that the user set; exit code 3."""

    exit_code = 3


class ShapeError(CloqError):
    """Tensors disagree about a shape, or a shape does not fit the layout (group, rank, word size)."""


class NonFiniteError(CloqError):
    """A tensor holds NaN or Inf where numbers are needed; the message names it."""


class SingularStatsError(CloqError):
    """A Gram matrix stays singular after damping."""


class SourceError(CloqError):
    """A model cannot be read: missing, corrupt, truncated, or not reachable without network."""


class UnsupportedModelError(CloqError):
    """The model's structure is not one this package can quantize."""


class DataError(CloqError):
    """Data cannot be found or read, or a line of it is malformed; the message names file and line."""


class CalibrationError(DataError):
    """The calibration text is missing, unreadable, empty, or too short for one window."""


class FormatError(CloqError):
    """A file does not hold what its layout promises."""


class BindingError(CloqError):
    """An adapter is bound to another base than the one it is used with."""


class RunDirectoryError(CloqError):
    """A run directory belongs to another recipe or source, or cannot be written."""


class OutputError(CloqError):
    """Standard output cannot be written, for another reason than a reader that has gone."""


class EngineError(CloqError):
    """An engine did not start, died, or refused a request; the message ends with its last lines."""


class HubError(CloqError):
    """The hub cannot be reached, or refuses what was asked of it."""


class MissingPackageError(CloqError):
    """A package is needed that is not installed or too old; the message says how to install it."""


class DivergedError(CloqError):
    """A training whose loss or weights became NaN or Inf; what was good before is kept."""
