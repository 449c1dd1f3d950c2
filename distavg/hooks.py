"""Optimizer steps -> `Averager.step`, only after steps that changed the weights."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distavg.errors import ConfigError

__all__ = ["OptimizerHooks"]


class OptimizerHooks:
    """The optimizers of one averager. Several count as one step once all have stepped.

    Args:
        on_step: Called after the step that completes a round.
        before_step: Called before each step, which writes to the weights.
    """

    def __init__(self, on_step: Callable[[], None], before_step: Callable[[], None]) -> None:
        self._on_step = on_step
        self._before_step = before_step
        self._attached: list[Optimizer] = []
        self._stepped: list[Optimizer] = []
        self._last: Optimizer | None = None  # the one that steps last in a round
        self._is_paused = False
        self._covers_all: bool | None = None  # None: not known

    def cover(self, parameters: Iterable[Tensor]) -> bool:
        """Whether no other optimizer steps any of these parameters. Looked at once."""
        if self._covers_all is None:
            covered = set().union(*map(_parameters, self._attached))
            self._covers_all = all(id(p) in covered for p in parameters if p.requires_grad)
        return self._covers_all

    def attach(
        self, optimizers: Sequence[Optimizer], parameters: Iterable[Tensor]
    ) -> RemovableHandle:
        """Follow these optimizers, too.

        Args:
            optimizers: The optimizers.
            parameters: The model's.

        Raises:
            ConfigError: Not an optimizer, one that is attached already or shares parameters with
                one that is, or one of another model.
        """
        parameters = list(parameters)
        inner = [_unwrapped(optimizer) for optimizer in optimizers]
        if not inner:
            raise ConfigError("attach: give at least one optimizer")
        for i, optimizer in enumerate(inner):
            name, mine = type(optimizer).__name__, _parameters(optimizer)
            for other in self._attached + inner[:i]:
                if optimizer is other:
                    raise ConfigError(
                        f"attach: this {name} is attached already; a second time would count its "
                        "steps twice"
                    )
                if not mine.isdisjoint(_parameters(other)):
                    raise ConfigError(
                        f"attach: this {name} has parameters of the {type(other).__name__} that is "
                        "attached already, and a step would wait for both: if it takes that one's "
                        "place, first call remove() of the handle that its attach() returned"
                    )
            if mine.isdisjoint(map(id, parameters)):
                raise ConfigError(
                    f"attach: this {name} has no parameter of the averaged model: was it built "
                    "before the model was wrapped, or for copies of its parameters? Build it from "
                    "model.parameters(), or call step() yourself once the weights have changed"
                )
        self._attached += inner
        self._last = None
        self._covers_all = None
        handles = [
            handle
            for optimizer in inner
            for handle in (
                optimizer.register_step_pre_hook(lambda *_: self._before_step()),
                optimizer.register_step_post_hook(self._after_step),
            )
        ]
        return _Attachment(handles, lambda: self._detach(inner))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer under GradScaler skips an overflow step on the device and calls its
        # hooks all the same. Reading the flag costs one synchronisation, as GradScaler's own
        # does for the other optimizers.
        found_inf = getattr(optimizer, "found_inf", None)
        if self._is_paused or (found_inf is not None and found_inf.item()):
            return
        if all(optimizer is not other for other in self._stepped):
            self._stepped.append(optimizer)
        # After the first round only the optimizer that closed it closes others: one whose step
        # GradScaler skipped must not close the round, a step late, before the others have stepped.
        if len(self._stepped) == len(self._attached) and self._last in (None, optimizer):
            self._last = optimizer
            self._stepped.clear()
            self._on_step()

    def paused(self, also: Callable[[Path], object]) -> Callable[[Path], object]:
        """The same function, during which no step counts."""

        def call(folder: Path) -> None:
            self._is_paused = True
            try:
                also(folder)
            finally:
                self._is_paused = False

        return call

    def _detach(self, optimizers: Sequence[Optimizer]) -> None:
        gone = {id(optimizer) for optimizer in optimizers}
        self._attached = [each for each in self._attached if id(each) not in gone]
        self._stepped = [each for each in self._stepped if id(each) not in gone]
        self._last = None
        self._covers_all = None
        self._before_step()  # nobody else will, for an update that is under way


class _Attachment(RemovableHandle):
    """One handle for the hooks of several optimizers."""

    def __init__(self, handles: Sequence[RemovableHandle], detach: Callable[[], None]) -> None:
        super().__init__(OrderedDict())  # the base class wants one; it stays empty
        self._handles = handles
        self._detach = detach

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._detach()


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer whose `step` does the work: accelerate's wrapper, for one, has no hooks."""
    given = optimizer
    while not hasattr(optimizer, "_optimizer_step_post_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ConfigError(f"attach: {type(given).__name__} is not a torch.optim.Optimizer")
        optimizer = inner
    return optimizer  # type: ignore[no-any-return]  # it has the hooks of an Optimizer
