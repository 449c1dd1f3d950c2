"""An update: distavg against one flat lerp over the same bytes, and AveragedModel; three at once.

    python tests/benchmarks/updates.py
    torchrun --standalone --nproc-per-node 2 tests/benchmarks/updates.py

On one process the flat lerp is the floor: it moves the same bytes in one call. Under torchrun the
model is wrapped in DDP; AveragedModel keeps and updates a full replica on every rank, distavg a
part, and the bytes are those of rank 0's averages.
"""

from typing import Any

import measure
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from workloads import WORKLOADS, Parameters, small_gpt

import distavg

UPDATED = {"GPT, 1.3 M": small_gpt, **WORKLOADS}


class Unchecked(distavg.Averager):
    """One that does not look whether the weights are still where they were."""

    def _look(self) -> None:
        pass


def compare(name: str, count: int) -> list[dict[str, Any]]:
    module = Parameters(UPDATED[name]())
    model = DistributedDataParallel(module) if dist.is_initialized() else module
    averager = distavg.Averager(model, distavg.EMA(0.999))
    averager.step()
    theirs = {
        "AveragedModel, EMA": AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
        "AveragedModel, SWA": AveragedModel(module, multi_avg_fn=get_swa_multi_avg_fn()),
        "AveragedModel, SWA by default": AveragedModel(module),
    }
    unchecked = Unchecked(model, distavg.EMA(0.999))
    unchecked.step()
    three = distavg.Averager(model, {f"ema-{d}": distavg.EMA(d) for d in (0.9, 0.99, 0.999)})
    three.step()
    contestants = {
        "distavg, EMA": averager.step,
        "the same without its check": unchecked.step,
        "distavg, three EMAs": three.step,
    }
    against = "AveragedModel, EMA"
    if not dist.is_initialized():
        against = "one flat lerp_"
        flat = torch.cat([p.detach().view(-1) for p in module.parameters()])
        average = flat.clone()
        contestants = {against: lambda: average.lerp_(flat, 0.001), **contestants}
    for each, averaged in theirs.items():
        averaged.update_parameters(module)
        contestants[each] = lambda averaged=averaged: averaged.update_parameters(module)
    table = measure.rows(measure.rounds(contestants, count), against)
    for row in table:
        if row["what"] == "distavg, EMA":
            row["bytes_held"] = averager["ema"].nbytes
        elif row["what"] in theirs:
            row["bytes_held"] = sum(p.nbytes for p in theirs[row["what"]].module.parameters())
    if not dist.is_initialized() or dist.get_rank() == 0:
        measure.report(
            f"{name}: {sum(p.numel() for p in module.parameters()):,} parameters, "
            f"{len(list(module.parameters()))} tensors",
            table,
            against,
        )
        ms = {row["what"]: row["median_ms"] for row in table}
        print(f"three EMAs / one: {ms['distavg, three EMAs'] / ms['distavg, EMA']:.2f}")
    return table


if __name__ == "__main__":
    measure.main(__doc__, UPDATED, compare, default_rounds=41)
