"""An update: distavg and the systems that are in use, side by side; three averages at once.

    python tests/benchmarks/updates.py
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tests/benchmarks/updates.py

On one process a flat `lerp_` is the floor: it moves the same bytes in one call. Under torchrun the
model is wrapped in DDP; the others keep and update a full replica on every rank, distavg a part,
and the bytes held are those of rank 0's averages. All follow one rule, as systems.py says, and are
checked against it before they are timed; `SWA` is the mean. What a system leaves to a thread or a
stream of its own is waited for within its time.

Where all averages together are more than memory holds, they take turns: groups of rounds, the
reference in each. Every ratio is to the reference in the same rounds.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from systems import DECAY, Distavg, System, check, inner, installed, local
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from workloads import WORKLOADS, Parameters, small_gpt

import distavg

UPDATED = {"GPT, 1.3 M": small_gpt, **WORKLOADS}


class UncheckedAverager(distavg.Averager):
    """One that does not look whether the weights are still where they were."""

    def _look(self) -> None:
        pass


class Unchecked(Distavg):
    kind = UncheckedAverager


class ThreeEmas(Distavg):
    rules = {  # noqa: RUF012
        name: distavg.EMA(decay, include_initial=True)
        for name, decay in (("a", DECAY), ("b", 0.99), ("c", 0.9))
    }


CONTESTANTS: dict[str, type[System]] = {
    "distavg, EMA": Distavg,
    "the same without its check": Unchecked,
    "distavg, three EMAs": ThreeEmas,
} | installed()


def at_once(model: nn.Module) -> int:
    """How many full replicas there is memory for, beside what the check and the floor take."""
    nbytes = sum(live.nbytes for live in local(inner(model).parameters()))
    if torch.accelerator.is_available():
        available = torch.accelerator.get_memory_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        nbytes *= dist.get_world_size() if dist.is_initialized() else 1
    found = torch.tensor(int(0.8 * available // nbytes) - 6)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return max(2, int(found))


def timed(system: System) -> Callable[[], None]:
    def update() -> None:
        system.update()
        system.wait()

    return update


def compare(name: str, count: int) -> list[dict[str, Any]]:
    module = Parameters(UPDATED[name]()).to(measure.device())
    model = DistributedDataParallel(module) if dist.is_initialized() else module
    floor: dict[str, Callable[[], object]] = {}
    against = "AveragedModel, EMA"
    if not dist.is_initialized():
        against = "one flat lerp_"
        flat = torch.cat([p.detach().view(-1) for p in module.parameters()])
        average = flat.clone()
        floor = {against: lambda: average.lerp_(flat, 1 - DECAY)}
    rest = [each for each in CONTESTANTS if each != against]
    size = at_once(model)
    table: list[dict[str, Any]] = []
    for group in range(0, len(rest), size):
        names = rest[group : group + size]
        if not floor:
            names = [against, *names]
        systems = {each: CONTESTANTS[each](model) for each in names}
        check(model, systems)
        contestants = floor | {each: timed(system) for each, system in systems.items()}
        found = measure.rows(measure.rounds(contestants, count), against)
        for row in found:
            row["group"] = group // size
            if row["what"] in systems:
                row["bytes_held"] = systems[row["what"]].bytes_held()
        table += [row for row in found if group == 0 or row["what"] != against]
        del systems, contestants
        gc.collect()  # before the next group's are built
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
