"""Peak memory of a rank in a short training run with each system, against training without one.

    python tests/benchmarks/memory.py [--ranks 2] [--json results.json] [--picture memory.png]

A transformer of 50 million parameters takes three steps of AdamW, under DDP and under FSDP2
(`fully_shard` of each layer and of the whole), each system in processes of its own that this
program starts: on the CPU their greatest resident size, on GPUs (one for each rank) the most that
was allocated. What is shown is the worst rank's peak less that of training without an average; so
what an update takes for a moment shows where it is more than the training itself takes then. The
systems' packages are imported before the measurement begins (training reuses what an import freed,
for the largest some 30 MB), and each average is checked after it, as systems.py says. Systems that
raise are shown with their error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from systems import System, check, installed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS, WIDTH, LAYERS = 3, 512, 16
WRAPPERS = ("DDP", "FSDP2")
SYSTEMS = {name: each for name, each in installed().items() if each.rule == "EMA"}
NONE = "no average"


def wrapped(wrapper: str) -> nn.Module:
    layers = [
        nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
        for _ in range(LAYERS)
    ]
    model = nn.Sequential(*layers).to(measure.device())
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def start_peak() -> int:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()
    measure.reset_peak()
    return measure.resident_bytes("VmRSS")


def peak() -> int:
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return measure.resident_bytes("VmHWM")


def train(model: nn.Module, system: System | None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randn(1, 16, WIDTH, device=measure.device())
    for _ in range(STEPS):
        model(batch).square().mean().backward()
        if system is not None:
            system.wait()
        optimizer.step()
        if system is not None:
            system.update()
        optimizer.zero_grad()
    if system is not None:
        system.wait()


def worker(rank: int, ranks: int, wrapper: str, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    measure.join(
        rank,
        rank=rank,
        world_size=ranks,
        init_method=f"file://{folder}/rendezvous",
        timeout=timedelta(seconds=120),  # for ranks of which another one has failed
    )
    torch.manual_seed(0)
    kind = SYSTEMS.get(name)
    if kind is not None and kind.package != "torch":
        kind(nn.Linear(1, 1, device=measure.device()))  # imports what it needs
    found: dict[str, Any] = {}
    begin = start_peak()
    try:
        model = wrapped(wrapper)
        system = None if kind is None else kind(model)
        train(model, system)
        found["bytes_peak"] = peak() - begin
        if kind is not None:
            found["bytes_held"] = system.bytes_held()
            del system
            check(model, {name: kind(model)})
    except (Exception, SystemExit) as error:  # ema-pytorch exits where it cannot copy a model
        found = {"error": type(error).__name__, "message": str(error) or str(error.__context__)}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(wrapper: str, name: str, ranks: int) -> dict[str, Any]:
    """The worst rank's bytes, or the first rank's error."""
    with tempfile.TemporaryDirectory(prefix="distavg-") as folder:
        mp.spawn(worker, (ranks, wrapper, name, folder), nprocs=ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    row = {"what": name, "wrapper": wrapper}
    failed = [each for each in found if "error" in each]
    if failed:
        return row | failed[0]
    return row | {key: max(each[key] for each in found) for key in found[0]}


def report(wrapper: str, table: list[dict[str, Any]], ranks: int) -> None:
    base = next(row["bytes_peak"] for row in table if row["what"] == NONE)
    print(f"\n{wrapper}, {ranks} ranks: {base / 1e6:.1f} MB at the peak without an average")
    print(f"{'':34}{'MB held':>10}{'MB more at the peak':>22}")
    for row in table:
        if "error" in row:
            print(f"{row['what']:34}{row['error']:>32}: {row['message'].splitlines()[0][:60]}")
        elif row["what"] != NONE:
            row["bytes_extra"] = row["bytes_peak"] - base
            held, extra = row["bytes_held"] / 1e6, row["bytes_extra"] / 1e6
            print(f"{row['what']:34}{held:10.1f}{extra:22.1f}")


def draw(tables: dict[str, list[dict[str, Any]]], ranks: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(tables), sharex=True, sharey=True)
    for axes, (wrapper, table) in zip(panels, tables.items(), strict=True):
        rows = [row for row in table if row["what"] != NONE]
        for place, row in enumerate(rows):
            extra = row.get("bytes_extra", 0) / 1e6
            color = "tab:orange" if row["what"].startswith("distavg") else "tab:blue"
            axes.barh(place, extra, color=color)
            text = row.get("error", f"{extra:.0f}")
            axes.text(max(extra, 0), place, f" {text}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
        axes.set_title(f"{wrapper}, {ranks} ranks", fontsize=10)
        axes.set_xlabel("MB per rank more than without an average")
        axes.margins(x=0.25)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    # What a rank frees goes back to the system at once, so that its resident size is what it uses.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    names = [NONE, *SYSTEMS]
    order = [(wrapper, name) for wrapper in WRAPPERS for name in names]
    found = {}
    for each in random.Random(0).sample(order, len(order)):
        found[each] = measured(*each, arguments.ranks)
    tables = {wrapper: [found[wrapper, name] for name in names] for wrapper in WRAPPERS}
    for wrapper, table in tables.items():
        report(wrapper, table, arguments.ranks)
    machine = measure.machine() | {"ranks": arguments.ranks}
    print("\n" + ", ".join(f"{key}: {value}" for key, value in machine.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, **tables}, indent=1) + "\n")
    if arguments.picture is not None:
        draw(tables, arguments.ranks, arguments.picture)


if __name__ == "__main__":
    main()
