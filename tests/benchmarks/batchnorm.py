"""Recalibration of a ResNet-50's BatchNorm against its forward passes alone.

    python tests/benchmarks/batchnorm.py
    torchrun --standalone --nproc-per-node 2 tests/benchmarks/batchnorm.py

The forward passes are those of PyTorch's `update_bn`: no gradients, BatchNorm in training mode.
Every rank has four batches of eight images; the collectives of one recalibration are counted.
"""

from collections import Counter
from typing import Any
from unittest import mock

import measure
import torch
import torch.distributed as dist
from transformers import ResNetConfig, ResNetModel

import distavg


def compare(name: str, count: int) -> list[dict[str, Any]]:
    size = int(name.removesuffix(" pixels"))
    model = ResNetModel(ResNetConfig())  # its defaults are those of ResNet-50
    batches = list(torch.randn(4, 8, 3, size, size))

    @torch.no_grad()
    def forwards() -> None:
        model.train()
        for batch in batches:
            model(batch)

    def recalibrate() -> None:
        distavg.recalibrate_batchnorm(model, batches)

    recalibrate()  # makes its process group
    seen: Counter[str] = Counter()
    with mock.patch.multiple(
        dist, **{each: counted(each, seen) for each in ("all_gather", "all_reduce", "broadcast")}
    ):
        recalibrate()
    against = "forward passes"
    table = measure.rows(
        measure.rounds({against: forwards, "recalibrate_batchnorm": recalibrate}, count), against
    )
    table[1]["collectives"] = dict(seen)
    if not dist.is_initialized() or dist.get_rank() == 0:
        measure.report(f"{name}: collectives {dict(seen)}", table, against)
    return table


def counted(name: str, seen: Counter[str]) -> Any:
    function = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        seen[name] += 1
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    measure.main(__doc__, ["64 pixels", "128 pixels", "224 pixels"], compare, default_rounds=9)
