"""Side-by-side timing: every contestant once a round, so that all see the same machine."""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distavg import __version__


def device() -> torch.device:
    """The accelerator, where there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronize() -> None:
    """Wait for what is queued on the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def join(local_rank: int, **options: Any) -> None:
    """Join the process group of this job, on this rank's accelerator where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(local_rank)
        dist.init_process_group(**options)  # gloo on the CPU, and the accelerator's own
    else:
        dist.init_process_group("gloo", **options)


def rounds(contestants: Mapping[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds of every contestant in each of `count` rounds, after two that do not count.

    The order is drawn anew each round: what ran before leaves its data in the caches.
    Under torchrun every measurement begins together and lasts until the slowest rank is done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order, draw = list(contestants), random.Random(0)
    for number in range(count + 2):
        draw.shuffle(order)
        for name in order:
            if dist.is_initialized():
                dist.barrier()
            synchronize()
            begin = time.perf_counter()
            contestants[name]()
            synchronize()
            spent = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            if dist.is_initialized():
                dist.all_reduce(spent, dist.ReduceOp.MAX)
            if number >= 2:
                seconds[name].append(spent.item())
    return seconds


def rows(seconds: Mapping[str, list[float]], against: str) -> list[dict[str, Any]]:
    """Median, quartiles and the ratio of medians to the contestant `against`."""
    base = statistics.median(seconds[against])
    table = []
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        table.append(
            {
                "what": name,
                "median_ms": 1e3 * median,
                "quartiles_ms": [1e3 * low, 1e3 * high],
                "ratio": median / base,
            }
        )
    return table


def report(title: str, table: list[dict[str, Any]], against: str) -> None:
    """Print one table."""
    print(f"\n{title}")
    print(f"{'':34}{'median ms':>10}{'quartiles':>21}{'/ ' + against:>26}")
    for row in table:
        low, high = row["quartiles_ms"]
        spread = f"{low:.2f} to {high:.2f}"
        print(f"{row['what']:34}{row['median_ms']:10.2f}{spread:>21}{row['ratio']:26.2f}", end="")
        print("".join(f"  {k}={v:,}" for k, v in row.items() if k.startswith("bytes")))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else device().type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "distavg": __version__,
    }


def main(
    doc: str,
    names: Iterable[str],
    compare: Callable[[str, int], list[dict[str, Any]]],
    *,
    default_rounds: int,
) -> None:
    """Run `compare(name, rounds)` for every workload; print the machine, and write all as JSON."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=default_rounds)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if dist.is_torchelastic_launched():
        join(int(os.environ["LOCAL_RANK"]))
    results = {name: compare(name, arguments.rounds) for name in names}
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("\n" + ", ".join(f"{key}: {value}" for key, value in machine().items()))
        if arguments.json is not None:
            content = {"machine": machine(), "rounds": arguments.rounds, **results}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak since `reset_peak`) of this process, in bytes. Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Start `VmHWM` anew from the present size. Linux."""
    Path("/proc/self/clear_refs").write_text("5")
