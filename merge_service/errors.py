"""User errors about checkpoints and techniques.

Every mistake that a user can fix derives from `UserError`: its message says what is wrong, where, and what to do, and the command
line exits with code 2. Any other exception is a defect of this software.
"""


class UserError(ValueError):
    """The user's input is wrong; the message alone must be enough to fix it."""


class CheckpointError(UserError):
    """A checkpoint cannot be used."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint file is not readable as safetensors: cut, overlapping, oversized header, unknown dtype."""


class IncompatibleCheckpoint(CheckpointError):
    """A checkpoint differs from its reference in keys, shapes or dtypes."""


class ForeignCheckpoint(CheckpointError):
    """A file of another known kind than safetensors: a pickle, a Git-LFS pointer, a study."""


class QuantisedCheckpoint(CheckpointError):
    """A checkpoint whose stored numbers are codes that have a meaning only with their scales."""


class AdapterCheckpoint(CheckpointError):
    """A checkpoint that holds an adapter, such as the factors of LoRA, not the weights of a model."""


class UnrelatedCheckpoint(CheckpointError):
    """An expert so far from its base that it cannot have been trained from it."""


class NonFiniteCheckpoint(CheckpointError):
    """A checkpoint holds NaN or infinity."""


class TechniqueError(UserError):
    """An unknown technique or parameter, a value out of range, or a form that does not exist."""


class ConflictingArrival(CheckpointError):
    """Another expert already arrived for the same time step or under the same id."""
