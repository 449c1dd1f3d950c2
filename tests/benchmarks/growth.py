"""Update time and bytes held as they grow: with parameters, and with ranks under DDP.

    python tests/benchmarks/growth.py
    for ranks in 1 2 4 8; do
        OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node $ranks tests/benchmarks/growth.py
    done

distavg against AveragedModel, both an EMA of constant decay 0.999 in fp32; at the first size their
averages are compared (`systems.check`). Parameters are in tensors of 1,000 x 1,000, so that only
their number grows. On one process there are 10 million to a billion, as far as the live weights and
both averages fit into 80 % of the memory that is available. Under torchrun there are 30 million on
any number of ranks, one row of the table a launch (on as many GPUs, where there are some); times
are those of the slowest rank, bytes those that rank 0 holds.
"""

import gc
from pathlib import Path
from typing import Any

import measure
import systems
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workloads import Parameters

MILLIONS = (10, 30, 100, 300, 1_000)
MILLIONS_UNDER_DDP = (30,)
THEIRS, OURS = "AveragedModel", "distavg"


def available_bytes() -> int:
    """Memory that a process can still take, within its container's limit if it has one."""
    if measure.device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit, used = (Path("/sys/fs/cgroup", f"memory.{each}") for each in ("max", "current"))
    if limit.exists() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found)


def grown(millions: int, count: int, *, check: bool) -> dict[str, Any]:
    """One row: this many parameters on this many ranks."""
    module = Parameters([(1_000, 1_000)] * millions).to(measure.device())
    model = DistributedDataParallel(module) if dist.is_initialized() else module
    averages = {THEIRS: systems.Averaged(model), OURS: systems.Distavg(model)}
    if check:
        systems.check(model, averages)
    updates = {name: average.update for name, average in averages.items()}
    rows = measure.rows(measure.rounds(updates, count), THEIRS)
    for row in rows:
        row["bytes_held"] = averages[row["what"]].bytes_held()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return {"millions": millions, "ranks": ranks, **{row["what"]: row for row in rows}}


def compare(name: str, count: int) -> list[dict[str, Any]]:
    fitting = MILLIONS_UNDER_DDP
    if not dist.is_initialized():
        most = 0.8 * available_bytes()
        fitting = tuple(millions for millions in MILLIONS if 3 * 4e6 * millions <= most)
        print(f"{most / 1e9:.1f} GB to use: up to {max(fitting):,} of {max(MILLIONS):,} million")
    table = []
    for millions in fitting:
        table.append(grown(millions, count, check=millions == fitting[0]))
        gc.collect()  # the memory of this one is needed for the next
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"\n{name}: median ms (quartiles)")
        print(f"{'parameters':>14}{'ranks':>7}{THEIRS:>30}{OURS:>30}{'ratio':>7}  bytes held")
        for row in table:
            print(f"{row['millions']:12,} M{row['ranks']:7}", end="")
            for each in (row[THEIRS], row[OURS]):
                low, high = each["quartiles_ms"]
                spread = f"{each['median_ms']:.2f} ({low:.2f} to {high:.2f})"
                print(f"{spread:>30}", end="")
            print(f"{row[OURS]['ratio']:7.2f}  {row[OURS]['bytes_held']:,}", end="")
            print(f" of {row[THEIRS]['bytes_held']:,}")
    return table


if __name__ == "__main__":
    name = "with ranks" if dist.is_torchelastic_launched() else "with parameters"
    measure.main(__doc__, [name], compare, default_rounds=21)
