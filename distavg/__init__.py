"""Running averages of model weights (SWA, EMA), sharded, inside distributed PyTorch training."""

from distavg.average import Average
from distavg.averager import Averager
from distavg.checkpoint.save import SaveHandle, latest
from distavg.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointExists,
    CheckpointMismatch,
    CheckpointNotFound,
    ConfigError,
    DistavgError,
    ModelMismatch,
    RankError,
    ReplicaMismatch,
    StateError,
    UnsupportedError,
)
from distavg.rules import EMA, SWA, Rule
from distavg.schedule import Clock

__all__ = [
    "EMA",
    "SWA",
    "Average",
    "Averager",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointExists",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "Clock",
    "ConfigError",
    "DistavgError",
    "ModelMismatch",
    "RankError",
    "ReplicaMismatch",
    "Rule",
    "SaveHandle",
    "StateError",
    "UnsupportedError",
    "latest",
]

__version__ = "0.1.0"
