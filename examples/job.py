"""What a long job adds to a training loop: it leaves when told to, and goes on where it left.

Used by the other examples; not run by itself.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import distavg

SIGNALS = signal.SIGTERM, signal.SIGUSR1
HEARD: set[int] = set()  # by this process, whichever its job at that moment


class Job:
    """A training run and its folder of checkpoints.

    Told to leave (SIGTERM from an agent or a scheduler, SIGUSR1 from launch/slurm.sbatch), nothing
    happens at once: the training loop asks, saves, and leaves between two steps. After SIGTERM the
    process ends with the usual status of an end by it, so that no agent takes the job for done; who
    sends SIGUSR1 knows that it is not, and status 0 says that all is saved.

    Args:
        folder: Where the checkpoints are; None to save and resume nothing.
        averager: The averager of the model.
        model: In its wrapper.
        optimizer: Its optimizer.
        others: What else goes on where it was, by name: objects with a `state_dict`.
    """

    def __init__(
        self,
        folder: Path | None,
        averager: distavg.Averager,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **others: Any,
    ) -> None:
        self.folder, self.averager = folder, averager
        self.model, self.optimizer, self.others = model, optimizer, others
        self.saving: distavg.SaveHandle | None = None
        self.agreed: set[int] = set()  # signals that were heard on any rank, when all ranks asked
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        for each in SIGNALS:
            signal.signal(each, lambda number, _: HEARD.add(number))

    def resume(self) -> None:
        """Go on from the newest checkpoint, recorded in `starts.jsonl`. Collective."""
        if self.folder is None:
            return
        found = [distavg.latest(self.folder)]
        if dist.is_initialized():  # what another rank finds a moment later may be another
            dist.broadcast_object_list(found)
        if self.is_first:
            self._record(found[0])
        if found[0] is not None:
            self.averager.load(found[0], also=self._read)

    def _record(self, found: Path | None) -> None:
        start = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "took": found and found.name,
            "ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps(start) + "\n")
        print(f"starts from {found}" if found else f"starts anew in {self.folder}", flush=True)

    def must_leave(self) -> bool:
        """Whether any rank was told to. Collective: ranks hear of it at different steps."""
        told = torch.tensor([each in HEARD for each in SIGNALS], dtype=torch.uint8)
        if dist.is_initialized():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        # Not what is heard by now: a signal may have come while this rank waited for the others.
        self.agreed |= {each for each, is_told in zip(SIGNALS, told, strict=True) if is_told}
        return bool(self.agreed)

    def save(self) -> None:
        """Save in the background; the newest three are kept. Collective."""
        if self.folder is not None:
            path = self.folder / f"step-{self.averager.step_count}"
            self.saving = self.averager.save(path, block=False, keep=3, also=self._write)

    def finish(self) -> None:
        """Wait for the last save."""
        if self.saving is not None:
            self.saving.wait()

    @property
    def status(self) -> int:
        """What the process ends with."""
        is_terminated = self.agreed == {signal.SIGTERM} and signal.SIGUSR1 not in HEARD
        return 128 + signal.SIGTERM if is_terminated else 0

    def _write(self, folder: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        if self.is_first:
            others = {name: each.state_dict() for name, each in self.others.items()}
            torch.save(others, folder / "others.pt")

    def _read(self, folder: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=state)
        for name, state in torch.load(folder / "others.pt").items():
            self.others[name].load_state_dict(state)
