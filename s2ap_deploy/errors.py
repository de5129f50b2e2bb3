"""Every error a user can meet, and the exit code each one carries.

::

    DeployError                 70  anything unforeseen in our own code
    ├── InputError               2  an input that cannot be used
    │   ├── UsageError              options that contradict each other or lack a partner
    │   ├── CheckpointError         unreadable, damaged or non-finite weights
    │   │   └── UnsafePickleError   a pickle that asks for more than tensors
    │   ├── ArchitectureError       no architecture, or more than one, fits the weights
    │   ├── DataError               a data set that is missing, damaged or of the wrong kind
    │   ├── RecipeError             a recipe with an unknown key or an impossible value
    │   ├── PluginError             a plug-in that fails, is not what it says, or is not there
    │   ├── RunFolderError          a run folder that is locked, foreign or holds something else
    │   └── StorageError            the disk refused a read or a write
    ├── VerificationError        1  an export that does not match what was certified
    └── InconclusiveError        3  stopped early, or too little evidence for a verdict
        └── OutOfTimeError          the time budget ran out; the state is saved

Every message says what happened and where; ``hint`` says what to type next. ``code`` is stable: scripts and
tests rely on it, never on the wording.
"""

from __future__ import annotations

PASSED = 0
FAILED = 1
UNUSABLE = 2
INCONCLUSIVE = 3
UNFORESEEN = 70
INTERRUPTED = 130


class DeployError(Exception):
    """Root of the tree.

    Args:
        message: what happened and where.
        code: a stable identifier in kebab-case, such as ``sparsity-missing``; the class's own by default.
        hint: what the user can type next.
    """

    exit_code = UNFORESEEN
    default_code = "internal"

    def __init__(self, message: str, *, code: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint


class InputError(DeployError):
    """An input, option or recipe that cannot be used."""

    exit_code = UNUSABLE
    default_code = "input"


class UsageError(InputError):
    """Options that contradict each other, or that need a partner."""

    default_code = "usage"


class CheckpointError(InputError):
    """A checkpoint that is unreadable, damaged, non-finite or of the wrong shape."""

    default_code = "checkpoint"


class UnsafePickleError(CheckpointError):
    """A pickle that asks for more than tensors and plain containers."""

    default_code = "unsafe-pickle"


class ArchitectureError(InputError):
    """No registered architecture fits the weights, or more than one does."""

    default_code = "architecture"


class DataError(InputError):
    """A data set that is missing, damaged or does not fit the model."""

    default_code = "data"


class RecipeError(InputError):
    """A recipe with an unknown key or an impossible value."""

    default_code = "recipe"


class PluginError(InputError):
    """A plug-in that fails, is not what it says, or is not installed; names the distribution."""

    default_code = "plugin"


class RunFolderError(InputError):
    """A run folder that is locked, is not one, or already holds something else."""

    default_code = "run-folder"


class StorageError(InputError):
    """The disk refused a read or a write (no space, no permission)."""

    default_code = "storage"


class VerificationError(DeployError):
    """An exported file that does not match the model it was made from."""

    exit_code = FAILED
    default_code = "verification"


class InconclusiveError(DeployError):
    """The work ended without a verdict; nothing was lost."""

    exit_code = INCONCLUSIVE
    default_code = "inconclusive"


class OutOfTimeError(InconclusiveError):
    """The time budget ran out; the state is saved and ``--resume`` continues."""

    default_code = "out-of-time"
