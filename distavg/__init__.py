"""Running averages of model weights (SWA, EMA), sharded, inside distributed PyTorch training."""

from distavg.average import Average
from distavg.averager import Averager
from distavg.batchnorm import recalibrate_batchnorm
from distavg.checkpoint.folders import latest
from distavg.checkpoint.save import SaveHandle
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
from distavg.learning_rate import ThenSWALR
from distavg.rules import EMA, SWA, Custom, PowerEMA, Rule, Warmup
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
    "Custom",
    "DistavgError",
    "ModelMismatch",
    "PowerEMA",
    "RankError",
    "ReplicaMismatch",
    "Rule",
    "SaveHandle",
    "StateError",
    "ThenSWALR",
    "UnsupportedError",
    "Warmup",
    "latest",
    "recalibrate_batchnorm",
]

__version__ = "0.1.0"
