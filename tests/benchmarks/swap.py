"""`applied()` in and out against copying the same bytes four times, and the memory that it takes.

    python tests/benchmarks/swap.py
    torchrun --standalone --nproc-per-node 2 tests/benchmarks/swap.py

The usual way keeps a second copy of the model: store the live weights, copy the average in, copy
the live weights back is three copies; an exchange in both directions moves each byte four times.
Under torchrun the model is wrapped in DDP, and the pieces also travel between the ranks both ways.
"""

from typing import Any

import measure
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workloads import WORKLOADS, Parameters

import distavg


def compare(name: str, count: int) -> list[dict[str, Any]]:
    module = Parameters(WORKLOADS[name]())
    model = DistributedDataParallel(module) if dist.is_initialized() else module
    averager = distavg.Averager(model, distavg.EMA(0.999))
    averager.step()
    lives = [p.detach() for p in module.parameters()]
    copies = [torch.zeros_like(live) for live in lives]

    def copy_four_times() -> None:
        for _ in range(2):
            torch._foreach_copy_(copies, lives)
            torch._foreach_copy_(lives, copies)

    def swap() -> None:
        with averager.applied():
            pass

    measure.reset_peak()
    before = measure.resident_bytes("VmRSS")
    swap()  # the first one: the allocator has nothing to give back yet
    extra = measure.resident_bytes("VmHWM") - before
    against = "four copies"
    table = measure.rows(
        measure.rounds({against: copy_four_times, "applied()": swap}, count), against
    )
    table[1]["bytes_extra"] = extra
    if not dist.is_initialized() or dist.get_rank() == 0:
        measure.report(f"{name}: {sum(live.nbytes for live in lives):,} bytes", table, against)
    return table


if __name__ == "__main__":
    measure.main(__doc__, WORKLOADS, compare, default_rounds=31)
