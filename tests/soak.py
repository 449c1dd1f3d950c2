"""A job that cannot be broken, broken again and again: python tests/soak.py --minutes 20.

It trains, averages, swaps, recalibrates BatchNorm, saves in both ways, and resumes, each time on
another world size and layout, from whatever the last fault has left. The live weights are a pure
function of the step, so after every fault the latest checkpoint must hold, bit for bit, what a run
holds that was never disturbed. Before the faults comes one long undisturbed job: it may not
grow. Nothing may be left in memory, in temporary folders, or beside the checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from checks import RULES, differences, torch_average, trained
from models import Uneven, build
from ranks import PRELOAD
from soak_job import KEEP, batches, of, run

from distavg import Averager
from distavg.checkpoint.folders import committed, prune_uncommitted
from distavg.checkpoint.read import verify_checkpoint
from distavg.checkpoint.records import read_records, shard_name

LAYOUTS = {
    "plain": (1,),
    "ddp": (1, 2, 3),
    "fsdp2": (1, 2, 3),
    "fsdp1": (2, 3),
    "fsdp2-keep": (2, 3),
}
FAULTS = ("kill one", "kill all", "tell one", "tell all", "stop one")
STATISTICS = ["norm.running_mean", "norm.running_var"]
CAMPAIGN_SECONDS = 120.0  # then all begins anew, in another folder


def wrong(path: Path) -> list[str]:
    """What of a checkpoint is not as in a run that was never disturbed."""
    found = list(verify_checkpoint(path)[1])
    averager = Averager(build("plain", Uneven, seed=99), RULES)
    averager.load(path)
    steps = range(averager.step_count)
    for rule in RULES:
        values, average = averager.full_state_dict(rule), averager[rule]
        found += differences(of(values), of(torch_average(Uneven, rule, steps)))
        if average.num_updates != len(steps):
            found.append(f"{rule}: {average.num_updates} updates after {len(steps)} steps")
        if average.statistics_at is not None:
            _, undisturbed = trained("plain", Uneven, steps[: average.statistics_at])
            undisturbed.recalibrate_batchnorm(batches(0, 1), rule)
            expected = undisturbed.full_state_dict(rule)
            found += differences(of(values, STATISTICS), of(expected, STATISTICS))
    return found


class Job:
    """Ranks that are forked from a server, and what they say.

    Attributes:
        what: What was started.
        output: The file that they write to.
    """

    def __init__(self, root: Path, layout: str, world_size: int, device: str, seconds: float):
        self.what = f"{layout} on {world_size}, averages on {device}"
        self.output = root.with_name(f"output-{time.time_ns()}")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = (world_size, port, self.output, root, layout, device, seconds)
        self._ranks = [context.Process(target=run, args=(n, *job)) for n in range(world_size)]
        for rank in self._ranks:
            rank.start()
        deadline = time.monotonic() + 60
        while len(self.said("training")) < world_size and time.monotonic() < deadline:
            time.sleep(0.01)

    def lines(self, beginning: str) -> list[str]:
        written = self.output.read_text() if self.output.exists() else ""
        return [line for line in written.splitlines() if line.startswith(beginning)]

    def said(self, what: str) -> list[str]:
        """Of each line that begins so, the last word."""
        return [line.split()[-1] for line in self.lines(what)]

    def suffer(self, fault: str, rng: random.Random) -> Iterator[str]:
        """Do it; what was wrong already."""
        if not all(rank.is_alive() for rank in self._ranks):
            yield "it ended by itself"
        what, _, whom = fault.partition(" ")
        victims = self._ranks if whom == "all" else [rng.choice(self._ranks)]
        if what == "stop":
            signal_to(victims, signal.SIGSTOP)
            time.sleep(rng.uniform(0, 2))
            signal_to(victims, signal.SIGCONT)
        signal_to(victims, signal.SIGKILL if what == "kill" else signal.SIGTERM)

    def end(self, seconds: float, *, is_killed: bool) -> Iterator[str]:
        """Wait until all ranks have ended, which they must; what was wrong."""
        deadline = time.monotonic() + seconds
        for rank in self._ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        if hanging := [rank for rank in self._ranks if rank.is_alive()]:
            yield f"{len(hanging)} ranks hung"
            signal_to(hanging, signal.SIGKILL)
            for rank in hanging:
                rank.join()
        statuses = [rank.exitcode for rank in self._ranks]
        if any(statuses) != is_killed:
            yield f"it ended with {statuses}"
        yield from self.lines("bad")


def signal_to(ranks: Sequence[multiprocessing.Process], number: signal.Signals) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid or 0, number)


class Soak:
    """One campaign: a folder, a long undisturbed job, and faults until the time is over."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._root, self._temporary = folder / "checkpoints", folder / "temporary"
        self._refused = folder / "refused"
        for each in (self._root, self._temporary, self._refused):
            each.mkdir()
        self._seed, self._rng = seed, random.Random(seed)
        self._shared = shared_memory()
        self.counts = dict.fromkeys([*FAULTS, "spoil"], 0)
        self.looks = 0  # at what the longest job held
        self.bad = 0

    def run(self, seconds: float) -> None:
        ends = time.monotonic() + seconds - 10
        self._round("none", seconds / 3)
        while time.monotonic() < ends:
            self._round(self._rng.choice(FAULTS))
            if self._rng.random() < 0.3 and len(committed(self._root)) > 1:
                self._spoil_latest()
        self._round("none", 2.0)
        prune_uncommitted(self._root)
        self._report("at the end", list(leftovers(self._root)))

    def steps(self) -> int:
        """Those of the latest checkpoint that is whole."""
        kept = [manifest for path, manifest in committed(self._root) if path.name != "spoiled"]
        return kept[-1].steps if kept else 0

    def _round(self, fault: str, seconds: float = 60.0) -> None:
        rng, before = self._rng, self.steps()
        layout, device = rng.choice(list(LAYOUTS)), rng.choice(["beside", "cpu"])
        job = Job(self._root, layout, rng.choice(LAYOUTS[layout]), device, seconds)
        found = []
        if set(job.said("training from")) != {str(before)}:
            found.append(f"it did not resume from {before}")
        spoiled = [*self._root.glob("spoiled"), *self._refused.iterdir()]
        if fault != "none":
            time.sleep(rng.uniform(0, 1))
            found += job.suffer(fault, rng)
            self.counts[fault] += 1
        found += job.end(60 + seconds, is_killed="kill" in fault)
        self.looks = max([self.looks, *map(int, job.said("looks"))])
        if "kill" not in fault and set(job.said("left at")) != {str(self.steps())}:
            found.append("it did not save when it left")
        if self.steps() < before:
            found.append(f"the latest checkpoint went from {before} to {self.steps()}")
        for path in spoiled:
            shutil.rmtree(path)
        if found_checkpoints := committed(self._root):
            found += wrong(found_checkpoints[-1][0])
        found += self._left()
        if found:
            found.append(f"its output is in {job.output}")
        else:
            job.output.unlink()
        self._report(f"{fault}: {job.what}", found)

    def _spoil_latest(self) -> None:
        """Flip a bit of the latest checkpoint, or cut a file of it off; no resume may take it."""
        path = committed(self._root)[-1][0]
        kind = self._rng.choice(["*/*.safetensors", "manifest.json"])
        file = self._rng.choice(sorted(path.glob(kind)))
        content = bytearray(file.read_bytes())
        at = self._rng.randrange(len(content))
        content[at] ^= 1 << self._rng.randrange(8)
        file.write_bytes(content if self._rng.random() < 0.5 else content[:at])
        path.rename(self._root / "spoiled")
        self.counts["spoil"] += 1

    def _left(self) -> Iterator[str]:
        """What the dead have left in the temporary folder and in shared memory."""
        for path in self._temporary.iterdir():
            yield f"{path} is left"
        for path in shared_memory() - self._shared:
            if not any(str(path) in maps for maps in all_maps()):
                yield f"{path} is left"

    def _report(self, what: str, found: list[str]) -> None:
        self.bad += bool(found)
        if found:
            print(f"BAD, {what}:", *found, sep="\n  ")
            print(f"  repeat: python tests/soak.py --minutes 2 --seed {self._seed}", flush=True)


def shared_memory() -> set[Path]:
    """What lies there, but for multiprocessing's semaphores: the job makes none, others do."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")}


def all_maps() -> Iterator[str]:
    """What each living process has mapped."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            yield maps.read_text()


def leftovers(root: Path) -> Iterator[str]:
    """What is in a folder of checkpoints beyond those that a run keeps, and their files."""
    found = committed(root)
    if len(found) > KEEP + 1:  # and the one that it resumed from
        yield f"there are {len(found)} checkpoints"
    known = set()
    for path, manifest in found:
        known |= {path, path / "manifest.json", *(path / folder for folder in manifest.folders)}
        for average in manifest.averages.values():
            known |= {path / file.name for file in read_records(path, manifest, average)}
            for rank, record in enumerate(average.records):
                if record is not None:
                    known.add(path / f"{shard_name(average.folder, rank)}.json")
            known.add(path / average.folder / "model.safetensors.index.json")
        if manifest.extra_folder is not None:
            known |= set((path / manifest.extra_folder).iterdir())
    yield from (f"{path} is left" for path in set(root.rglob("*")) - known)


def main() -> None:
    logging.getLogger("distavg").setLevel(logging.ERROR)  # it passes over what was spoiled
    torch.set_num_threads(1)  # as in the job: with more, a forward adds up in another order
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    arguments = parser.parse_args()
    seed, bad, ends = arguments.seed, 0, time.monotonic() + 60 * arguments.minutes
    while (seconds := ends - time.monotonic()) > CAMPAIGN_SECONDS / 4 or seed == arguments.seed:
        folder = Path(tempfile.mkdtemp(prefix="distavg-soak-"))
        soak = Soak(folder, seed)
        soak.run(min(seconds, CAMPAIGN_SECONDS))
        print(
            f"seed {seed}: {soak.steps()} steps, {soak.looks} looks, {soak.counts}, {soak.bad} bad",
            flush=True,
        )
        if soak.bad:
            print(f"  all of it is in {folder}")
        else:
            shutil.rmtree(folder)
        bad, seed = bad + soak.bad, seed + 1
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
