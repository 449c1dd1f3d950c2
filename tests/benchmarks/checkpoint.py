"""Saves and loads against raw writes and reads of the same bytes, and PyTorch's own writers.

    python tests/benchmarks/checkpoint.py [--rounds 5] [--json results.json]

An EMA of 1.5 GB of fp32 in a transformer's shapes under FSDP2, on 2 and on 4 gloo ranks that this
program starts itself. Saves are flushed to the disk on all sides; loads are warm, and the raw reads
are of the same files. PyTorch's writers compute no checksums. `export` writes whole tensors in one
process, against copying the files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import measure
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from ranks import close_pool, run_ranks
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from workloads import Parameters, Shapes

import distavg
from distavg.cli import main as command_line

TIMEOUT = 1200.0
Seconds = dict[str, list[float]]


def transformer(width: int = 1200, blocks: int = 18) -> Shapes:
    """219 tensors, 373 million parameters."""
    d = width
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,)]
    block += [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), *block * blocks, (d,), (d,)]


def averager_of(shapes: Shapes, dim: int = 0) -> distavg.Averager:
    model = Parameters(shapes)
    fully_shard(model, shard_placement_fn=lambda p: Shard(dim if p.dim() > dim else 0))
    averager = distavg.Averager(model, distavg.EMA(0.999))
    averager.update()
    return averager


def timed(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds until the slowest rank is done, and the most extra memory that a rank took."""
    measure.reset_peak()
    before = measure.resident_bytes("VmRSS")
    dist.barrier()
    begin = time.perf_counter()
    call()
    spent = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    extra = torch.tensor(measure.resident_bytes("VmHWM") - before)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    dist.all_reduce(extra, dist.ReduceOp.MAX)
    return spent.item(), int(extra)


def rounds(
    contestants: dict[str, Callable[[], object]], count: int, tidy: Callable[[], object]
) -> tuple[Seconds, dict[str, int]]:
    """Every contestant in each round, in an order that turns; `tidy` before each, untimed."""
    seconds: Seconds = {name: [] for name in contestants}
    extra = dict.fromkeys(contestants, 0)
    names = list(contestants)
    for number in range(count + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            tidy()
            spent, nbytes = timed(contestants[name])
            if number:
                seconds[name].append(spent)
                extra[name] = max(extra[name], nbytes)
    return seconds, extra


def own_tensors(averager: distavg.Averager) -> list[torch.Tensor]:
    tensors = [shard.tensor.detach() for shard in averager["ema"].shards()]
    return [tensor for tensor in tensors if tensor.numel()]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def columns_of(tensors: list[torch.Tensor]) -> Iterator[memoryview]:
    """Memory to read into: a buffer, of which each filling goes to rows of half of the columns."""
    buffer = torch.empty(2**21)
    for tensor in tensors:
        for half in tensor.chunk(2, dim=1) if tensor.dim() == 2 else [tensor]:
            for rows in half.split(2**21 // half[0].numel()):
                part = buffer[: rows.numel()].view(rows.shape)
                yield bytes_of(part)
                rows.copy_(part)


def write_raw(path: Path, views: list[memoryview]) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for view in views:
        while view:
            view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    os.close(descriptor)


def read_raw(files: list[Path], size: int, views: Iterator[memoryview]) -> None:
    """Fill memory of this size with this rank's share of the bytes of these files, in order."""
    rank = dist.get_rank()
    skipped = sum(path.stat().st_size for path in files) * rank // dist.get_world_size()
    view = next(views)
    for path in files * 2:  # the last rank may come to an end before its memory is full
        nbytes = path.stat().st_size
        if skipped >= nbytes:
            skipped -= nbytes
            continue
        descriptor = os.open(path, os.O_RDONLY)
        os.lseek(descriptor, skipped, os.SEEK_SET)
        skipped = 0
        while size and (done := os.readv(descriptor, [view[: 2**23]])):
            size -= done
            view = view[done:] or next(views, view[:0])
        os.close(descriptor)
    if size:
        raise RuntimeError(f"{size} bytes were not read")


def measure_saves(root: str, shapes: Shapes, count: int, dim: int, keep: str) -> Any:
    averager = averager_of(shapes, dim)
    rank, folder = dist.get_rank(), Path(root, "saves")
    tensors = averager.state_dict()["averages"]["ema"]["tensors"]
    views = list(map(bytes_of, own_tensors(averager)))

    def tidy() -> None:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        dist.barrier()

    contestants: dict[str, Callable[[], object]] = {
        "raw writes": lambda: write_raw(folder / f"raw-{rank}", views),
        "distavg": lambda: averager.save(folder / "a"),
        "distavg, returns from the background": lambda: None,
        "DCP safetensors": lambda: dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(folder / "b"), save_distributed=True),
        ),
        "DCP native": lambda: dcp.save(tensors, checkpoint_id=folder / "c"),
    }
    background: list[distavg.SaveHandle] = []

    def in_background() -> None:
        background.append(averager.save(folder / "d", block=False))

    contestants["distavg, returns from the background"] = in_background

    def tidy_all() -> None:
        while background:
            background.pop().wait()
        tidy()

    found = rounds(contestants, count, tidy_all)
    tidy_all()
    averager.save(f"{root}/{keep}")
    dcp.save(
        tensors,
        storage_writer=HuggingFaceStorageWriter(f"{root}/{keep}-hf", save_distributed=True),
    )
    dcp.save(tensors, checkpoint_id=f"{root}/{keep}-dcp")
    return found


def measure_loads(root: str, shapes: Shapes, count: int, source: str) -> Any:
    averager = averager_of(shapes)
    tensors = averager.state_dict()["averages"]["ema"]["tensors"]
    own, path = own_tensors(averager), f"{root}/{source}"
    size = sum(tensor.nbytes for tensor in own)
    files = sorted(Path(path, "ema").glob("*.safetensors"))
    contestants: dict[str, Callable[[], object]] = {
        "raw reads": lambda: read_raw(files, size, map(bytes_of, own)),
        "distavg": lambda: averager.load(path),
        "distavg, unverified": lambda: averager.load(path, verify=False),
        "DCP safetensors": lambda: dcp.load(
            tensors, storage_reader=HuggingFaceStorageReader(f"{path}-hf")
        ),
        "DCP native": lambda: dcp.load(tensors, checkpoint_id=f"{path}-dcp"),
    }
    if "columns" in source:
        contestants["raw reads, copied to columns"] = lambda: read_raw(files, size, columns_of(own))
    return rounds(contestants, count, lambda: None)


def measure_export(root: Path, count: int) -> tuple[Seconds, dict[str, int]]:
    files = sorted(root.glob("2-ranks/ema/*.safetensors"))
    seconds: Seconds = {"copying the files": [], "distavg export": []}

    def copy(target: Path) -> None:
        target.mkdir()
        for file in files:
            shutil.copyfile(file, target / file.name)
            with (target / file.name).open("rb") as copied:
                os.fsync(copied.fileno())

    def export(target: Path) -> None:
        arguments = ["export", str(root / "2-ranks"), "-o", str(target)]
        result = CliRunner().invoke(command_line, arguments)
        if result.exit_code:
            raise RuntimeError(result.output)

    extra = dict.fromkeys(seconds, 0)
    for number in range(count + 1):
        for name, call in (("copying the files", copy), ("distavg export", export)):
            target = root / "exported"
            shutil.rmtree(target, ignore_errors=True)
            measure.reset_peak()
            before = measure.resident_bytes("VmRSS")
            begin = time.perf_counter()
            call(target)
            if number:
                seconds[name].append(time.perf_counter() - begin)
                extra[name] = max(extra[name], measure.resident_bytes("VmHWM") - before)
    shutil.rmtree(root / "exported")
    return seconds, extra


def growth(root: str, tensors: int, count: int) -> Any:
    """Saves and loads of as many tensors of 1,024 elements."""
    averager = averager_of([(32, 32)] * tensors)
    path = f"{root}/growth"
    found = rounds(
        {
            "save": lambda: averager.save(path, overwrite=True),
            "load": lambda: averager.load(path),
        },
        count,
        lambda: None,
    )
    if dist.get_rank() == 0:
        shutil.rmtree(path)
    dist.barrier()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1200, help="of the transformer")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shapes, count = transformer(arguments.width), arguments.rounds
    results: dict[str, Any] = {}

    def note(title: str, found: tuple[Seconds, dict[str, int]], against: str | None) -> None:
        seconds, extra = found
        table = measure.rows(seconds, against or next(iter(seconds)))
        for row in table:
            row["bytes_extra"] = extra[row["what"]]
        results[title] = table
        measure.report(title, table, against or next(iter(seconds)))
        sys.stdout.flush()

    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="distavg-") as folder:
        root = Path(folder)
        for size, dim, keep in ((2, 0, "2-ranks"), (4, 0, "4-ranks"), (2, 1, "2-columns")):
            found = run_ranks(
                measure_saves, size, folder, shapes, count if dim == 0 else 1, dim, keep,
                timeout=TIMEOUT,
            )  # fmt: skip
            close_pool()
            if dim == 0:
                note(f"save on {size} ranks", found[0], "raw writes")
        for source, size in (("2-ranks", 4), ("4-ranks", 2), ("4-ranks", 1), ("2-columns", 2)):
            found = run_ranks(measure_loads, size, folder, shapes, count, source, timeout=TIMEOUT)
            close_pool()
            note(f"load {source} on {size}", found[0], "raw reads")
        note("export", measure_export(root, count), "copying the files")
        for size, tensors in ((2, 100), (2, 1000), (2, 20_000), (1, 1000), (4, 1000), (8, 1000)):
            found = run_ranks(growth, size, folder, tensors, 3, timeout=TIMEOUT)
            close_pool()
            note(f"{tensors} tensors on {size} ranks", found[0], None)
    machine = measure.machine()
    print("\n" + ", ".join(f"{key}: {value}" for key, value in machine.items()))
    if arguments.json is not None:
        content = {"machine": machine, "rounds": count, **results}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
