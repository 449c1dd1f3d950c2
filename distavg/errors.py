"""Every exception that distavg raises.

```
DistavgError
├── ConfigError (ValueError)       an argument that cannot be: a decay of 1.2
├── UnsupportedError (NotImplementedError)   tensors and places that averages cannot have
├── StateError (RuntimeError)      a call at the wrong moment: step() inside applied()
├── ModelMismatch (ValueError)     the model is not the one that the averager was built with
├── ReplicaMismatch (RuntimeError) ranks that should hold the same tensor do not
├── RankError (RuntimeError)       another rank failed, or did not come within the timeout
└── CheckpointError (RuntimeError)
    ├── CheckpointExists           the target is taken
    ├── CheckpointNotFound         nothing there, or a save that was never committed
    ├── CheckpointCorrupt          a file is missing, torn, foreign or spoiled
    └── CheckpointMismatch         whole, but not of this model: names, shapes, dtypes, rules
```

A failure on one rank is raised on every rank: the failing rank raises its own error, the others
the same type with the failing ranks and their messages in the text (`distavg.comm`).
"""

__all__ = [
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointExists",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "ConfigError",
    "DistavgError",
    "ModelMismatch",
    "RankError",
    "ReplicaMismatch",
    "StateError",
    "UnsupportedError",
]


class DistavgError(Exception):
    """The root of every exception of this package."""


class ConfigError(DistavgError, ValueError):
    """An argument has a value that cannot be."""


class UnsupportedError(DistavgError, NotImplementedError):
    """A tensor, a wrapper or an option that distavg does not serve."""


class StateError(DistavgError, RuntimeError):
    """A call that is not allowed at this moment."""


class ModelMismatch(DistavgError, ValueError):
    """The model differs from the one that the averager was built with."""


class ReplicaMismatch(DistavgError, RuntimeError):
    """Ranks that should hold the same tensor hold different ones."""


class RankError(DistavgError, RuntimeError):
    """Another rank failed, or did not come within the timeout."""


class CheckpointError(DistavgError, RuntimeError):
    """A checkpoint could not be written or read."""


class CheckpointExists(CheckpointError):
    """The target of a save is taken."""


class CheckpointNotFound(CheckpointError):
    """There is no committed checkpoint at the path."""


class CheckpointCorrupt(CheckpointError):
    """A file of a checkpoint is missing, torn, another save's, or spoiled."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint is whole but does not fit the model or the rules."""
