"""Saves with a fault in each system call, on real ranks: python tests/crashes.py [--every N].

`strace` traces one rank of two while it overwrites a checkpoint. First it records which system
calls touch the checkpoint; then, one save for each of them, it makes that call fail (an I/O error,
a full disk), or kills the rank there. Afterwards the folder must hold the old checkpoint whole or
the new one whole, the other rank must have ended with an error or well, and the next save succeed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from checks import RULES, differences, error_of, feed, torch_average, trained
from models import Uneven, build
from ranks import close_pool, run_ranks

from distavg import Averager, CheckpointNotFound

CALLS = "openat,mkdir,write,pwrite64,writev,fsync,rename,unlink,rmdir,chmod,ftruncate,unlinkat"
Case = tuple[int, str, int]  # the rank, the system call, its number among those of this name
OLD, NEW = range(3), range(4)


def why_not() -> str | None:
    """Why this machine cannot do it."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(
        ["strace", "-e", "trace=none", "true"], capture_output=True, text=True, check=False
    )
    return f"strace may not trace: {tried.stderr:.80}" if tried.returncode else None


@contextlib.contextmanager
def traced(log: str, *options: str) -> Iterator[None]:
    """This process's system calls go through strace, which may spoil some."""
    command = ["strace", "-f", "-y", "-p", str(os.getpid()), "-o", log, "-e", f"trace={CALLS}"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        assert "attached" in line, line
        try:
            yield
        finally:
            tracer.terminate()


def averager_at(steps: range) -> Averager:
    return trained("fsdp2", Uneven, steps)[1]


def overwrite_traced(
    root: str, rank: int, options: Sequence[str], is_careless: bool = False
) -> str:
    """Overwrite root/a, with one rank's calls traced; what this rank heard.

    Args:
        root: The folder.
        rank: The rank to trace.
        options: Further ones of strace.
        is_careless: Remove the old checkpoint first, as no save may.
    """
    model, averager = trained("fsdp2", Uneven, OLD)
    feed(averager, model, NEW[len(OLD) :])
    dist.barrier()
    if is_careless and dist.get_rank() == 0:
        Path(root, "a", "manifest.json").unlink()
    dist.barrier()
    log = f"{root}/trace-{os.getpid()}"
    with traced(log, *options) if dist.get_rank() == rank else contextlib.nullcontext():
        return error_of(averager.save, f"{root}/a", overwrite=True)


def cases_of(root: Path, rank: int) -> list[Case]:
    """The system calls of a rank's main thread that touch the checkpoint."""
    run_ranks(save_old, 2, str(root))
    run_ranks(overwrite_traced, 2, str(root), rank, [])
    (log,) = root.glob("trace-*")
    lines = log.read_text().splitlines()
    log.unlink()
    main = log.name.partition("-")[2]
    numbers: dict[str, int] = {}
    cases = []
    for line in lines:
        match = re.match(rf"{main} +(\w+)\(", line)
        if match is not None:
            name = match[1]
            numbers[name] = numbers.get(name, 0) + 1
            if f"{root}/a" in line:
                cases.append((rank, name, numbers[name]))
    return cases


def save_old(root: str) -> None:
    shutil.rmtree(f"{root}/a", ignore_errors=True)
    dist.barrier()
    averager_at(OLD).save(f"{root}/a", also=lambda folder: None)


def state_of(path: Path) -> str:
    """Which checkpoint is there, read by one process into a plain model."""
    averager = Averager(build("plain", Uneven, seed=99), RULES)
    try:
        averager.load(path)
    except CheckpointNotFound:
        return "nothing"
    names = [name for name, p in Uneven().named_parameters() if p.requires_grad]
    found = {rule: averager.full_state_dict(rule) for rule in RULES}
    for what, steps in (("old", OLD), ("new", NEW)):
        expected = {rule: torch_average(Uneven, rule, steps) for rule in RULES}
        if not any(
            differences({n: found[r][n] for n in names}, {n: expected[r][n] for n in names})
            for r in RULES
        ):
            return what
    return "a mixture"


def spoil(
    root: Path, case: Case, fault: str, *, is_careless: bool = False
) -> tuple[str, list[str | None], bool]:
    """Do one save with a fault in it.

    Returns:
        What the folder holds afterwards, what each rank heard, and whether the fault happened.
    """
    rank, call, number = case
    run_ranks(save_old, 2, str(root))
    inject = f"inject={call}:{fault}:when={number}"
    options = ["-e", inject]
    heard = run_ranks(
        overwrite_traced, 2, str(root), rank, options, is_careless, expect_death=(rank,)
    )
    (log,) = root.glob("trace-*")
    has_happened = "INJECTED" in log.read_text() or heard[rank] is None
    log.unlink()
    return state_of(root / "a"), heard, has_happened


def offences(root: Path, case: Case, fault: str, *, is_careless: bool = False) -> list[str]:
    """What a fault did that it may not do."""
    state, heard, has_happened = spoil(root, case, fault, is_careless=is_careless)
    found = []
    if not has_happened:
        found.append("the fault did not happen")
    if state not in ("old", "new"):
        found.append(f"the folder holds {state}")
    rank, _, _ = case
    has_failed = [text is None or text != "nothing" for text in heard]
    if state == "old" and not all(has_failed):
        found.append(f"it says that it saved, and did not: {heard}")
    if heard[1 - rank] is None:
        found.append("the other rank died, too")
    text = error_of(run_ranks, save_again, 2, str(root))
    if text != "nothing" or state_of(root / "a") != "new":
        found.append(f"the next save failed: {text}")
    return found


def save_again(root: str) -> None:
    model, averager = trained("fsdp2", Uneven, OLD)
    feed(averager, model, NEW[len(OLD) :])
    averager.save(f"{root}/a", overwrite=True)
    left = {each.name for each in Path(root, "a").iterdir()}
    assert not any(name.startswith(".") for name in left), left


FAULTS = ("error=EIO", "error=ENOSPC", "signal=SIGKILL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take only every N-th case")
    every = parser.parse_args().every
    if reason := why_not():
        sys.exit(reason)
    started, bad, count = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="distavg-crashes-") as folder:
        root = Path(folder)
        cases = [case for rank in (0, 1) for case in cases_of(root, rank)]
        print(f"{len(cases)} system calls of two ranks touch the checkpoint")
        for case in cases[::every]:
            for fault in FAULTS:
                count += 1
                if found := offences(root, case, fault):
                    bad += 1
                    print(case, fault, *found, sep="; ", flush=True)
    close_pool()
    print(f"{count} faults, {bad} with offences, {time.monotonic() - started:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
