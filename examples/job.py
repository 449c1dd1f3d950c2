"""What a long job adds to a training loop: it leaves when told to, and goes on where it left.

Used by the other examples; not run by itself.
"""

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

import distavg


class Leave:
    """Hears what tells a job to leave: SIGTERM from an agent or a scheduler, SIGUSR1 from launch/.

    Nothing happens at once: the training loop asks, and leaves between two steps.
    """

    def __init__(self) -> None:
        self._is_told = False
        for each in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, self._hear)

    def _hear(self, _: int, __: FrameType | None) -> None:
        self._is_told = True

    def __bool__(self) -> bool:
        """Whether any rank was told to. Collective: ranks hear of it at different steps."""
        told = torch.tensor(self._is_told, dtype=torch.uint8)
        if dist.is_initialized():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)


def newest(folder: Path, parallel: str) -> Path | None:
    """The checkpoint to go on from, recorded in `starts.jsonl`. Collective.

    The first rank looks for all: what one rank finds a moment later may be another.
    """
    found = [distavg.latest(folder)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if not dist.is_initialized() or dist.get_rank() == 0:
        start = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "took": found[0] and found[0].name,
            "ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "parallel": parallel,
            "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps(start) + "\n")
        print(f"starts from {found[0]}" if found[0] else f"starts anew in {folder}", flush=True)
    return found[0]
