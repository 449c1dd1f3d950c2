"""Kill a torchrun job at random instants, again and again: python tests/soak.py --rounds 200.

Each round starts the job on another world size and layout; it resumes from the latest checkpoint,
goes on averaging and saving (in the background, too), and is killed: one worker, or all at once.
The live weights are a pure function of the step, so after every kill the latest checkpoint must
hold, bit for bit, the averages of a run that was never killed, and so must the job at the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist
from checks import RULES, differences, torch_average
from models import Uneven, build, set_weights, weights_at

import distavg
from distavg import Averager
from distavg.checkpoint.manifest import read_manifest
from distavg.checkpoint.read import verify_checkpoint

LAYOUTS = {"ddp": (1, 2, 3), "fsdp2": (1, 2, 3), "fsdp1": (2, 3), "fsdp2-keep": (2, 3)}
NAMES = [name for name, p in Uneven().named_parameters() if p.requires_grad]


def worker(root: Path, layout: str, last_step: int) -> None:
    dist.init_process_group("gloo")
    model = build(layout)
    averager = Averager(model, RULES)
    if (path := distavg.latest(root)) is not None:
        averager.load(path)
    os.write(1, b"training\n")  # in one piece
    for step in range(averager.step_count, last_step):
        set_weights(model, weights_at(model, step))
        averager.step()
        averager.save(root / f"step-{step + 1}", keep=3, overwrite=True, block=step % 2 == 0)
    averager.save(root / "end")
    dist.destroy_process_group()


def wrong(path: Path) -> list[str]:
    """What of a checkpoint is not as in a run that was never killed."""
    found = list(verify_checkpoint(path)[1])
    averager = Averager(build("plain", Uneven, seed=99), RULES)
    averager.load(path)
    steps = range(averager.step_count)
    for rule in RULES:
        values, expected = averager.full_state_dict(rule), torch_average(Uneven, rule, steps)
        found += differences({n: values[n] for n in NAMES}, {n: expected[n] for n in NAMES})
        if averager[rule].num_updates != len(steps):
            found.append(f"{rule}: {averager[rule].num_updates} updates after {len(steps)} steps")
    return found


def launch(root: Path, layout: str, world_size: int, last_step: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", __file__, "--worker", str(root), layout]
    return subprocess.Popen(
        [*command, str(last_step)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def soak(rounds: int, seed: int) -> int:
    """Returns the number of rounds after which something was wrong."""
    rng, bad, at = random.Random(seed), 0, []
    previous = 0
    with tempfile.TemporaryDirectory(prefix="distavg-soak-") as folder:
        root = Path(folder)
        for number in range(rounds):
            layout = rng.choice(list(LAYOUTS))
            world_size = rng.choice([size for size in LAYOUTS[layout] if size != previous])
            previous = world_size
            with launch(root, layout, world_size, last_step=10**6) as job:
                assert job.stdout is not None
                for _ in range(world_size):
                    assert job.stdout.readline() == "training\n", f"round {number} did not start"
                time.sleep(rng.uniform(0, 0.6))
                workers = children(job.pid)
                victims = [rng.choice(workers)] if rng.random() < 0.5 else [job.pid, *workers]
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                job.communicate(timeout=60)
            path = distavg.latest(root)
            found = wrong(path) if path is not None else []
            at.append(read_manifest(path).steps if path is not None else 0)
            if found or at[-1] < max(at):
                bad += 1
                print(f"round {number}: {layout} on {world_size}, {path}: {found}", flush=True)
        with launch(root, "fsdp2", 2, last_step=at[-1] + 5) as job:
            job.communicate(timeout=120)
        end = wrong(root / "end")
        bad += bool(end)
        print(
            f"{rounds} kills, {at[-1]} steps, seed {seed}: {bad} bad; at the end {end or 'equal'}"
        )
    return bad


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        root, layout, last_step = sys.argv[2:]
        worker(Path(root), layout, int(last_step))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    sys.exit(bool(soak(arguments.rounds, arguments.seed)))


if __name__ == "__main__":
    main()
