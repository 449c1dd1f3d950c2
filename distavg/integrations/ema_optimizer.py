"""`EMAOptimizer`, the optimizer wrapper of NeMo and of PyTorch's pull request 94820."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distavg.averager import Averager
from distavg.comm import Comm
from distavg.errors import CheckpointMismatch, ConfigError
from distavg.rules import EMA
from distavg.wrappers import Model, is_sharded

__all__ = ["EMAOptimizer"]

_Key = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, offsets and sizes of a part
_NONE = torch.empty(0, 0, 0, 0, 0, 0, 0)  # of a shape that no parameter has


class EMAOptimizer(Optimizer):
    """An optimizer after whose steps an EMA of its parameters is updated.

    `ema = decay * ema + (1 - decay) * weight` after the steps 1, 1 + n, 1 + 2n ... that changed the
    weights; those before the first are where it begins. bf16 and fp16 weights have an EMA in fp32.

    Args:
        optimizer: The optimizer to wrap.
        device: Where the EMA lies: at present beside the parameters.
        decay: The share of the old EMA that an update keeps.
        every_n_steps: n.
        current_step: Steps made already.
        model: The model in its wrappers. Each rank then holds its shard of the EMA, which is of all
            trainable parameters of the model, and building this, `swap_ema_weights()` and
            `load_state_dict()` are collective. Without it each rank holds all of the EMA of the
            optimizer's parameters, nothing communicates, and sharded parameters are refused.

    Raises:
        ConfigError: Sharded parameters without `model`.
    """

    _step_supports_amp_scaling = False  # so GradScaler skips steps itself, of fused optimizers too

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device | str,
        decay: float = 0.9999,
        every_n_steps: int = 1,
        current_step: int = 0,
        *,
        model: Model | None = None,
    ) -> None:
        self.optimizer, self.device, self._model = optimizer, torch.device(device), model
        self.decay, self.every_n_steps, self.current_step = decay, every_n_steps, current_step
        self._comm = Comm(_group_of_one() if model is None else None)
        self._build({})

    def _build(self, values: Mapping[_Key, Tensor]) -> None:
        """Make an averager that begins with these values, and without any with the weights."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group]
        if self._model is None and any(map(is_sharded, parameters)):
            raise ConfigError("EMAOptimizer: the parameters are sharded: pass model=, wrapped")
        is_beside = all(self.device in (p.device, torch.device(p.device.type)) for p in parameters)
        self.averager = Averager(
            nn.ModuleList(map(nn.ParameterList, groups)) if self._model is None else self._model,
            {"ema": EMA(self.decay, update_interval=None)},
            device=None if is_beside else self.device,
            process_group=self._comm.group,
        )
        if values:
            self.averager.update()
            for key, tensor in self._parts().items():
                tensor.copy_(values.get(key, tensor).detach())

    def _parts(self) -> dict[_Key, Tensor]:
        shards = self.averager["ema"].shards()
        return {(shard.fqn, shard.box.offsets, shard.box.sizes): shard.tensor for shard in shards}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See the optimizer that is wrapped."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        """Step the optimizer, then update the EMA if it is due. No communication."""
        if self.averager["ema"].num_updates == 0:
            self.averager.update()
        loss = self.optimizer.step(closure)
        if self.current_step % self.every_n_steps == 0:
            self.averager.update()
        self.current_step += 1
        return loss

    def swap_ema_weights(self, enabled: bool = True) -> AbstractContextManager[None]:
        """A context with the EMA in place of the weights. Collective, if `model` was given."""
        return self.averager.applied() if enabled else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What the original's has, with this rank's part of the EMA. Not collective."""
        parts = self._parts() if self.averager["ema"].num_updates else {}
        return {
            "opt": self.optimizer.state_dict(),
            "ema": tuple(parts.values()),
            "boxes": list(parts),
            "current_step": self.current_step,
            "decay": self.decay,
            "every_n_steps": self.every_n_steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back this rank's `state_dict()`, or without `model` one of the original.

        Raises:
            CheckpointMismatch: It holds other parameters, or another rank's part of them.
        """
        with self._comm.together("EMAOptimizer.load_state_dict()"):
            keys = state_dict.get("boxes", _whole_keys(self.optimizer))
            values = dict(zip(keys, state_dict.get("ema", ()), strict=False))
            wanted = self._parts() if state_dict.get("ema", keys) else {}
            for key in (key for key in wanted if values.get(key, _NONE).shape != key[2]):
                raise CheckpointMismatch(
                    f"EMAOptimizer: no EMA in the state of {key[0]} at {key[1]}, sizes {key[2]}: a "
                    "state is loaded by the rank that saved it, with model= as it was built; to "
                    "reshard, save and load its averager"
                )
        self.optimizer.load_state_dict(state_dict["opt"])
        self.current_step = state_dict["current_step"]
        self.decay, self.every_n_steps = state_dict["decay"], state_dict["every_n_steps"]
        self._build(values)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer; its EMA begins with its weights."""
        self.optimizer.add_param_group(param_group)
        if self._model is None:
            self._build(self._parts() if self.averager["ema"].num_updates else {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an EMAOptimizer is not copied or pickled: use its state_dict()")


def _whole_keys(optimizer: Optimizer) -> list[_Key]:
    """All parameters by the names that they have without a model."""
    return [
        (f"{i}.{j}", (0,) * parameter.dim(), tuple(parameter.shape))
        for i, group in enumerate(optimizer.param_groups)
        for j, parameter in enumerate(group["params"])
    ]


def _group_of_one() -> dist.ProcessGroup | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    ranks = [dist.get_rank()]
    group: dist.ProcessGroup = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return group
