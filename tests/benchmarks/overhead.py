"""What an update costs besides moving data: microseconds of Python and launches per call.

    python tests/benchmarks/overhead.py

Models of 100, 1,000 and 20,000 parameters of one element each, on the GPU where there is one. The
floor of a call with an update due is `torch._foreach_lerp_` over the same lists. A call without one
(its interval is 1,000,000 steps) is what `step()` costs on all other steps. All averages are EMAs
of constant decay 0.999, and are compared (`systems.check`) before they are timed.
Calls that move no data are timed a hundred together, since one would be lost in the clock.
"""

import statistics
from collections.abc import Callable
from typing import Any

import measure
import systems
import torch
from systems import DECAY
from workloads import Parameters

import distavg

COUNTS = (100, 1_000, 20_000)
FLOOR = "torch._foreach_lerp_"
IDLE = "distavg, no update due"
CALLS = {IDLE: 100}  # in one measurement


def contestants(model: Parameters) -> dict[str, Callable[[], object]]:
    lives = [parameter.detach() for parameter in model.parameters()]
    averages = [live.clone() for live in lives]
    idle = distavg.Averager(model, distavg.EMA(DECAY, update_interval="1000000ba"))
    ours, theirs = systems.Distavg(model), systems.Averaged(model)
    systems.check(model, {"distavg": ours, "AveragedModel": theirs})

    def idle_steps() -> None:
        for _ in range(CALLS[IDLE]):
            idle.step()

    return {
        IDLE: idle_steps,
        FLOOR: lambda: torch._foreach_lerp_(averages, lives, 1 - DECAY),
        "distavg, an update due": ours.update,
        "AveragedModel": theirs.update,
    }


def compare(name: str, count: int) -> list[dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for tensors in COUNTS:
        model = Parameters([(1,)] * tensors).to(measure.device())
        for what, seconds in measure.rounds(contestants(model), count).items():
            microseconds = [1e6 * each / CALLS.get(what, 1) for each in seconds]
            row = table.setdefault(what, {"what": what})
            row[f"{tensors}_tensors_us"] = statistics.quantiles(microseconds, n=4)
    print(f"\n{name}: median (and quartiles) by the number of tensors")
    print(f"{'':26}" + "".join(f"{tensors:>36,}" for tensors in COUNTS))
    for row in table.values():
        cells = [row[f"{tensors}_tensors_us"] for tensors in COUNTS]
        texts = [f"{mid:,.1f} ({low:,.1f} to {high:,.1f})" for low, mid, high in cells]
        print(f"{row['what']:26}" + "".join(f"{text:>36}" for text in texts))
    return list(table.values())


if __name__ == "__main__":
    measure.main(__doc__, ["microseconds per call"], compare, default_rounds=41)
