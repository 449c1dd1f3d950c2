"""The public names, and that importing them does nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

import distavg

PUBLIC = {
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
}


def test_the_public_names() -> None:
    assert set(distavg.__all__) == PUBLIC
    assert len(distavg.__all__) == len(PUBLIC)
    for name in distavg.__all__:
        assert getattr(distavg, name).__doc__, f"{name} has no documentation"


def test_every_public_exception_has_one_root() -> None:
    for name in PUBLIC:
        value = getattr(distavg, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, distavg.DistavgError)


def test_the_version_is_that_of_the_distribution() -> None:
    assert distavg.__version__ == importlib.metadata.version("distavg")


PROBE = """
import json, logging, random, sys, warnings
import torch
import torch.distributed as dist
import torch.distributed.fsdp, torch.distributed.tensor  # sympy, below them, adds a warning filter
def state():
    return [
        torch.get_rng_state().tolist(), random.getstate()[1], torch.get_default_dtype().__repr__(),
        torch.get_num_threads(), torch.is_grad_enabled(), len(warnings.filters),
        [len(logging.getLogger(name).handlers) for name in (None, "distavg", "torch")],
        logging.getLogger().level, sys.excepthook.__name__,
    ]
before = state()
import distavg
print(json.dumps({
    "unchanged": state() == before,
    "handlers": len(logging.getLogger("distavg").handlers),
    "level": logging.getLogger("distavg").level,
    "group": dist.is_available() and dist.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
    "dynamo": "torch._dynamo" in sys.modules,
    "extras": sorted({"accelerate", "click", "hypothesis"} & set(sys.modules)),
}))
"""


@pytest.mark.timeout(60)
def test_importing_has_no_side_effects() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == {
        "unchanged": True,
        "handlers": 0,
        "level": 0,
        "group": False,
        "cuda": False,
        "dynamo": False,
        "extras": [],
    }
