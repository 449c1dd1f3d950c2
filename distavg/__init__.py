"""Running averages of model weights (SWA, EMA), sharded, inside distributed PyTorch training."""

from typing import NoReturn

from distavg.average import Average
from distavg.averager import Averager
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
]

__version__ = "0.1.0"


def __getattr__(name: str) -> NoReturn:
    if name == "recalibrate_batchnorm":
        raise UnsupportedError(f"distavg.{name} comes with a later release")
    raise AttributeError(f"module 'distavg' has no attribute {name!r}")
