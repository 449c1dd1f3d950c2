"""A learning rate that goes over to PyTorch's `SWALR` when an average starts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from distavg.averager import Averager
from distavg.errors import ConfigError

__all__ = ["ThenSWALR"]


class ThenSWALR(LRScheduler):
    """Any scheduler, and from an average's start on PyTorch's `SWALR`.

    `SWALR` anneals from the learning rate that it finds to `swa_lr` and stays there, so that the
    average samples from a constant one (Izmailov et al., 2018). Which of the two is stepped is
    decided by the averager's clock, so a resumed run goes on where it was. Once `SWALR` has begun,
    its rate holds, whoever else has set another one since.

    Call `step()` after the optimizer's and the averager's step, once per batch or per epoch, as the
    first scheduler wants it. Not collective; the same on every rank.

    Args:
        scheduler: What sets the learning rate until then; `ConstantLR(optimizer, factor=1)` to
            leave it as it is. Other settings that it varies, such as a momentum, stay as they are
            at the start.
        averager: The averager.
        swa_lr: The learning rate to end at, or one for each parameter group. None: each group's at
            the start.
        name: Which average.
        anneal_epochs: Over how many calls of `step()` to anneal: for calls after each batch,
            `len(loader)` is an epoch.
        anneal_strategy: `"cos"` or `"linear"`.
        once_per_update: Whether only updates of the average count in `anneal_epochs`, as in
            Composer's SWA: 20 with an update every 8 batches anneal over 160 batches.

    Raises:
        ConfigError: Not a scheduler, no average of that name, or what `SWALR` refuses.

    >>> from distavg import SWA, Clock
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> averager = Averager(model, SWA(start="2ba", update_interval="1ba"))
    >>> before = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    >>> scheduler = ThenSWALR(before, averager, 0.5, anneal_epochs=2, anneal_strategy="linear")
    >>> rates = []
    >>> for _ in range(5):
    ...     rates += scheduler.get_last_lr()
    ...     optimizer.step()
    ...     averager.step()
    ...     scheduler.step()
    >>> rates
    [1.0, 1.0, 1.0, 0.75, 0.5]
    """

    def __init__(
        self,
        scheduler: LRScheduler,
        averager: Averager,
        swa_lr: float | Sequence[float] | None,
        *,
        name: str | None = None,
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        once_per_update: bool = False,
    ) -> None:
        # Like SequentialLR, this steps others and does not call the base class's constructor.
        if not isinstance(scheduler, LRScheduler):
            raise ConfigError(
                f"ThenSWALR: {scheduler!r} is not a scheduler of torch.optim.lr_scheduler"
            )
        self.optimizer = scheduler.optimizer
        self._before = scheduler
        self._averager = averager
        self._name = name
        self._once_per_update = once_per_update
        averager.is_started(name)  # an error, unless it names one
        self._average = averager[averager.names[0] if name is None else name]
        self._num_updates = self._average.num_updates
        rates = self._rates()
        targets = [swa_lr] * len(rates) if isinstance(swa_lr, (int, float)) else swa_lr
        for target in () if targets is None else targets:
            if not isinstance(target, (int, float)) or not 0 <= target < math.inf:
                raise ConfigError(f"ThenSWALR: swa_lr={swa_lr!r} is not one or more learning rates")
        if targets is not None and len(targets) != len(rates):
            raise ConfigError(
                f"ThenSWALR: swa_lr={swa_lr!r} for an optimizer of {len(rates)} parameter groups"
            )
        self._targets = None if targets is None else list(targets)  # None: not settled yet
        try:
            self._swalr = SWALR(
                self.optimizer,
                rates,  # type: ignore[arg-type]  # its annotation lacks the documented list
                anneal_epochs=anneal_epochs,
                anneal_strategy=anneal_strategy,
            )
        except ValueError as error:
            raise ConfigError(f"ThenSWALR: {error}") from error
        self._last_lr = rates

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step whichever scheduler it is the turn of.

        Args:
            args: For the first scheduler: what `ReduceLROnPlateau` looks at.
            kwargs: Likewise.

        Raises:
            ConfigError: The optimizer has other parameter groups than in the beginning.
        """
        num_updates = self._average.num_updates
        is_update = num_updates > self._num_updates
        self._num_updates = num_updates
        if not self._averager.is_started(self._name):
            self._before.step(*args, **kwargs)
        else:
            self._prepare()
            if is_update or not self._once_per_update:
                self._swalr.step()
        self._last_lr = self._rates()

    def _prepare(self) -> None:
        """Set where `SWALR` goes to, and put back what it goes on from."""
        groups = self.optimizer.param_groups
        if self._targets is None:
            self._targets = self._rates()
        if len(groups) != len(self._targets):
            raise ConfigError(
                f"ThenSWALR: the optimizer has {len(groups)} parameter groups, and had "
                f"{len(self._targets)}: build a new one after add_param_group()"
            )
        for group, target in zip(groups, self._targets, strict=True):
            group["swa_lr"] = target
        if self._swalr.last_epoch > 0:
            for group, lr in zip(groups, self._swalr.get_last_lr(), strict=True):
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def _rates(self) -> list[Any]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """The state of both schedulers."""
        return {
            "scheduler": self._before.state_dict(),
            "swalr": self._swalr.state_dict(),
            "num_updates": self._num_updates,
            "targets": self._targets,
            "last_lr": self._last_lr,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, before or after the optimizer's.

        As with PyTorch's schedulers, the saved settings go on, not those of the constructor.
        """
        self._before.load_state_dict(state_dict["scheduler"])
        self._swalr.load_state_dict(state_dict["swalr"])
        self._num_updates = state_dict["num_updates"]
        self._targets = state_dict["targets"]
        self._last_lr = state_dict["last_lr"]
