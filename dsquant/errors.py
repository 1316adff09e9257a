"""Every error that dsquant raises on purpose.

    DsquantError                  exit code
    * UsageError                  2    an argument or a recipe that cannot be meant
    * InputError                  3    a checkpoint, text or output folder that cannot be used; nothing was written,
                                       or a job had finished layers before damaged values were read: these are kept
    * PackageError                3    another package cannot be imported; nothing was written
    * GateError                   4    a quality gate failed
    * InconclusiveError           5    too few samples to decide a gate, or a check that could not be run
    * Interrupted                 75   stopped at a safe point; `--resume` goes on

A message names the file or tensor, what was expected, what was found and what to do.
"""


class DsquantError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(DsquantError):
    """An argument or recipe that cannot be meant."""

    exit_code = 2


class InputError(DsquantError):
    """A checkpoint, text or output folder that cannot be used.

    Nothing was written, or nothing is left of it; only a job that had finished layers before keeps them, and says so.
    """

    exit_code = 3


class PackageError(DsquantError, ImportError):
    """Another package that the work needs cannot be imported: not a fault of what was to be read with it."""

    exit_code = 3


class GateError(DsquantError):
    """A quality gate failed."""

    exit_code = 4


class InconclusiveError(DsquantError):
    """Too few samples to decide a quality gate, or a check that could not be run."""

    exit_code = 5


class Interrupted(DsquantError):
    """The job stopped at a safe point (SIGTERM, disk full, budget exceeded) and can be resumed."""

    exit_code = 75
