"""The job that tests/soak.py disturbs: what each rank does, and how it looks after itself."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checks import RULES, cloned, differences, error_of, storages
from models import Uneven, backward, batch, build, set_weights, weights_at, whole_weights
from torch import Tensor, nn

import distavg
from distavg import Averager, CheckpointCorrupt

NAMES = [name for name, p in Uneven().named_parameters() if p.requires_grad]
KEEP = 3
BATCHES = 5
LOOK_EVERY = 2  # steps
# By how much each may vary; what leaks, leaks in each of hundreds of rounds.
MARGINS = {"bytes": 2**20, "objects": 50, "descriptors": 0, "threads": 0, "shared memory": 0}


def run(rank: int, world_size: int, port: int, output: Path, *job: Any) -> None:
    """One of the job's processes; what it says goes to a file."""
    opened = output.open("ab")
    os.dup2(opened.fileno(), 1)
    os.dup2(opened.fileno(), 2)
    opened.close()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    os.environ["TMPDIR"] = str(output.with_name("temporary"))
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    worker(*job)
    dist.destroy_process_group()


def say(message: str) -> None:
    os.write(1, f"\n{message}\n".encode())  # in one piece, after what a full disk cut off


def worker(root: Path, layout: str, device: str, seconds: float) -> None:
    """Go on for so long, or until any rank is told to go."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    model, averager = resumed(root, layout, None if device == "beside" else device)
    gc.freeze()  # what was imported is not garbage
    watch, ends = Watch(), time.monotonic() + seconds
    say(f"training from {averager.step_count}")
    while True:
        step = averager.step_count
        set_weights(model, weights_at(model, step))
        averager.step()
        operate(model, averager, root)
        if step % LOOK_EVERY == 0:
            watch.look()
        flag = torch.tensor([bool(told) or time.monotonic() > ends], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag:
            break
    averager.save(path_of(root, averager), keep=KEEP, overwrite=True)
    say(f"looks {watch.looks}")
    for growth in watch.growth():
        say(f"bad: {growth}")
    say(f"left at {averager.step_count}")


def path_of(root: Path, averager: Averager) -> Path:
    return root / f"step-{averager.step_count}"


def resumed(root: Path, layout: str, device: str | None) -> tuple[nn.Module, Averager]:
    """A model and its averager from the latest checkpoint that is whole; others are put aside."""
    while True:
        model = build(layout)
        averager = Averager(model, RULES, device=device, timeout=timedelta(seconds=30))
        if (path := distavg.latest(root)) is None:
            return model, averager
        try:
            averager.load(path)
        except CheckpointCorrupt:
            dist.barrier()
            if dist.get_rank() == 0:
                path.rename(root.parent / "refused" / path.name)
            dist.barrier()
        else:
            return model, averager


def operate(model: nn.Module, averager: Averager, root: Path) -> None:
    """One of the operations, the same on every rank and in every repetition of the step."""
    rng = random.Random(averager.step_count)
    rule, path = rng.choice(list(RULES)), path_of(root, averager)
    unlucky = rng.randrange(dist.get_world_size()) == dist.get_rank()
    mine = batch(seed=averager.step_count)  # something for also= to write

    def also(folder: Path) -> None:
        torch.save(mine, folder / f"rank-{dist.get_rank()}.pt")

    def also_raises(folder: Path) -> None:
        also(folder)
        if unlucky:
            raise ValueError("on purpose")

    match rng.choice(
        ["swap", "batchnorm", "save", "background", "also", "raise", "full", "reload"]
    ):
        case "swap":
            before = cloned(storages(model))
            with averager.applied(rule):
                inside = whole_weights(model)
                average = averager.full_state_dict(rule, all_ranks=True)
                check("applied", differences(of(inside), of(average)))
            check("after applied", differences(storages(model), before))
        case "batchnorm":
            averager.recalibrate_batchnorm(batches(dist.get_rank(), dist.get_world_size()), rule)
            backward(model)  # FSDP2 keeps a list of forwards until then
            model.zero_grad()
        case "save":
            averager.save(path, keep=KEEP, overwrite=True)
        case "background":
            averager.save(path, keep=KEEP, overwrite=True, block=False)
        case "also":
            averager.save(path, keep=KEEP, overwrite=True, also=also)
            averager.load(path, also=lambda folder: check("also", not any(folder.iterdir())))
        case "raise":
            error = error_of(averager.save, path, overwrite=True, also=also_raises)
            check_error("also= that raises", error, "ValueError: on purpose")
        case "full":
            block = rng.random() < 0.5
            with file_size_limit(rng.choice([0, 100]) if unlucky else None):
                error = error_of(lambda: averager.save(path, overwrite=True, block=block).wait())
            check_error("a full disk", error, "File too large")
        case "reload":
            averager.save(path, overwrite=True)
            averager.load(path)


def check(what: str, wrong: object) -> None:
    if wrong:
        say(f"bad: {what}: {wrong}")


def check_error(what: str, error: str, expected: str) -> None:
    """Where a rank was killed meanwhile, its loss is the error."""
    check(what, expected not in error and "lost contact" not in error and error)


def of(tensors: Mapping[str, Tensor], names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def batches(rank: int, world_size: int) -> list[Tensor]:
    """This rank's share of all batches for BatchNorm."""
    return [batch(seed=number) for number in range(rank, BATCHES, world_size)]


@contextlib.contextmanager
def file_size_limit(nbytes: int | None) -> Iterator[None]:
    """No file may grow beyond this, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if nbytes is None else nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Watch:
    """What this process holds, each time that it was looked at."""

    def __init__(self) -> None:
        self.looks = 0
        self._seen: dict[str, list[int]] = {what: [] for what in MARGINS}

    def look(self) -> None:
        self.looks += 1
        for thread in threading.enumerate():
            if thread.name == "distavg-save":
                thread.join()
        gc.collect()
        proc = Path("/proc/self")
        pages = int((proc / "statm").read_text().split()[1])
        self._seen["bytes"].append(pages * resource.getpagesize())
        self._seen["objects"].append(len(gc.get_objects()))
        self._seen["descriptors"].append(len(list((proc / "fd").iterdir())))
        self._seen["threads"].append(len(list((proc / "task").iterdir())))
        self._seen["shared memory"].append((proc / "maps").read_text().count("/dev/shm/"))

    def growth(self) -> Iterator[str]:
        """What has grown from the second third of a long life to the last."""
        for what, seen in self._seen.items():
            third = len(seen) // 3
            if third >= 20 and min(seen[-third:]) > min(seen[third:-third]) + MARGINS[what]:
                yield f"{what} grew: {seen}"
