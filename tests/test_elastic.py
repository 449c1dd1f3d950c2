"""An elastic torchrun job for real: agents join and leave, and the averages never notice.

Three agents share a rendezvous on this machine, one worker each; a change of any kind starts all
workers anew, on another world size and layout. This file is also the workers' script.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import RULES
from models import build, set_weights, weights_at
from soak import wrong

import distavg
from distavg import Averager

LAYOUTS = {1: "ddp", 2: "fsdp2", 3: "fsdp1"}
TOLD_TO_GO = 128 + signal.SIGTERM  # an exit status: with 0 the job would count as done
TIMEOUT = timedelta(seconds=20)


def worker(root: Path) -> None:
    """Train until there is a file `finish`, or until any rank is told to go."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    model = build(LAYOUTS[dist.get_world_size()])
    averager = Averager(model, RULES, timeout=TIMEOUT)
    if (path := distavg.latest(root)) is not None:
        averager.load(path)
    tell(root, "started")
    tell(root, f"on {dist.get_world_size()} from {averager.step_count}")
    while True:
        set_weights(model, weights_at(model, averager.step_count))
        averager.step()
        flags = torch.tensor([bool(told), (root / "finish").exists()], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        is_told, is_done = flags.tolist()
        if is_done or is_told:
            break
        step = averager.step_count
        if step % 5 == 0:
            averager.save(root / f"step-{step}", keep=2, overwrite=True, block=step % 2 == 0)
        time.sleep(0.01)
    averager.save(root / ("end" if is_done else f"step-{averager.step_count}"), overwrite=True)
    tell(root, f"left at {averager.step_count}")
    dist.destroy_process_group()
    sys.exit(0 if is_done else TOLD_TO_GO)


def tell(root: Path, event: str) -> None:
    """Append to the job's log; of what all ranks have to say, rank 0's."""
    if event == "started" or dist.get_rank() == 0:
        with (root / "log").open("a") as log:
            log.write(f"{event} {os.getpid()}\n")


class Job:
    """Agents of one elastic job, and what its workers have logged.

    Attributes:
        root: Where the workers save and log.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._endpoint = f"127.0.0.1:{free.getsockname()[1]}"

    def start(self, name: str) -> None:
        """Start an agent; the first hosts the rendezvous."""
        settings = [f"is_host={not self._agents}", "join_timeout=60", "last_call_timeout=1"]
        settings += ["keep_alive_interval=1", "keep_alive_max_attempt=3"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3"]
        command += ["--nproc-per-node=1", "--max-restarts=10", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={self._endpoint}", "--rdzv-id=job"]
        command += [f"--rdzv-conf={','.join(settings)}", __file__, str(self.root)]
        # Where agents share their store with workers, one that joins later waits in vain (2.13).
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with (self.root.parent / f"{name}.err").open("wb") as errors:
            self._agents[name] = subprocess.Popen(
                command, stderr=errors, env={**os.environ, **environment}
            )

    def kill_worker(self, name: str) -> None:
        for pid in children(self._agents[name].pid):
            os.kill(pid, signal.SIGKILL)

    def kill(self, name: str) -> None:
        """Kill an agent with its worker, as when a machine dies."""
        workers = children(self._agents[name].pid)
        for pid in (self._agents[name].pid, *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._agents[name].wait()

    def leave(self, name: str) -> None:
        """Tell an agent to go, as before a machine is taken away."""
        self._agents[name].terminate()
        assert self._agents[name].wait(30) != 0

    def ended(self, name: str) -> int:
        return self._agents[name].wait(30)

    def events(self) -> list[list[str]]:
        log = self.root / "log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    @contextlib.contextmanager
    def comes_up_on(self, world_size: int) -> Iterator[None]:
        """What the body does brings it up anew, on so many ranks; return when it has saved."""
        before = len(self.events())
        yield
        self._wait(lambda: any(e[:2] == ["on", str(world_size)] for e in self.events()[before:]))
        known = set(self.saved())
        self._wait(lambda: bool(set(self.saved()) - known))

    def saved(self) -> list[str]:
        return [str(path) for path in self.root.glob("step-*/manifest.json")]

    def _wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until():
            if time.monotonic() > deadline:
                pytest.fail(f"{self.events()}\n{self.errors()}")
            time.sleep(0.05)

    def errors(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.root.parent.glob("*.err"))

    def close(self) -> None:
        for name in self._agents:
            with contextlib.suppress(FileNotFoundError):  # it has ended
                self.kill(name)
        for event in self.events():  # workers outlive an agent that is killed
            if event[0] == "started" and Path(f"/proc/{event[1]}/cmdline").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(event[1]), signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    root = tmp_path / "job"
    root.mkdir()
    made = Job(root)
    yield made
    made.close()


@pytest.mark.timeout(300)  # for busy machines; it takes some 40 s
@pytest.mark.skipif(sys.platform != "linux", reason="finds the agents' workers in /proc")
def test_agents_that_die_leave_and_join(job: Job) -> None:
    with job.comes_up_on(2):
        job.start("first")
        job.start("second")
    with job.comes_up_on(2):
        time.sleep(random.uniform(0, 0.5))
        job.kill_worker("second")
    with job.comes_up_on(3):
        job.start("third")  # the others' workers are told to go, save, and come back with it
    with job.comes_up_on(2):
        time.sleep(random.uniform(0, 0.5))
        job.kill("third")
    with job.comes_up_on(1):
        job.leave("second")
    (job.root / "finish").touch()
    assert job.ended("first") == 0, job.errors()

    events = [event for event in job.events() if event[0] != "started"]
    steps = [int(event[-2]) for event in events]
    assert steps == sorted(steps)  # no resume fell behind an earlier one
    left = [(a[-2], b[-2]) for a, b in itertools.pairwise(events) if a[0] == "left"]
    assert len(left) >= 2
    assert all(step == resumed for step, resumed in left)  # who is told to go loses nothing
    assert wrong(job.root / "end") == []


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
