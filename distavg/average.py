"""Averages: a rule, its counter, and this rank's shards.

An average before its first update reads as the live weights.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distavg.errors import ConfigError, StateError
from distavg.foreach import Blend
from distavg.rules import Custom, Rule
from distavg.schedule import Schedule
from distavg.shards import GlobalTensor, ModelShards
from distavg.streams import are_pinned, host_tensors
from distavg.tensors import LiveTensor, Shard

__all__ = ["Average", "is_exchanged"]


class Average:
    """A running average of the live weights, as this rank holds it.

    Memory is taken here: one tensor for each owned shard of the live weights, beside it or in
    host memory, pinned where there is an accelerator.

    Attributes:
        schedule: Its name, its rule and when it updates.
        live: What of the live weights this rank averages.
        tensors: The averages, in the same order.
        num_updates: Updates made so far.
        is_applied: Whether it is in place of the live weights at present.
        was_read_early: Whether `applied()` was entered before the first update.
        dtypes: The dtype of every tensor of the average, on whichever rank, by canonical name.
        damaged: Why its values are not what they should be; None as long as they are.
        statistics: BatchNorm buffers of its own, whole and alike on every rank, by canonical name.
        statistics_at: How many updates had been made when they were measured; None if never.
        is_warned_of: Whether it was said that they are older than the average.
        on_host: Whether it lies in host memory, wherever the live weights are.
        wait: Waits for updates under way, of this and the model's other averages.

    Args:
        schedule: The rule under the averager's clock.
        model_shards: The live tensors.
        dtype: The dtype to average floating tensors in; None for fp32 in place of bf16 and fp16,
            and each tensor's own otherwise.
        on_host: See above.
    """

    def __init__(
        self,
        schedule: Schedule,
        model_shards: ModelShards,
        *,
        dtype: torch.dtype | None,
        on_host: bool = False,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"average {schedule.name!r}: dtype={dtype} is not a floating dtype")
        self.schedule = schedule
        self.num_updates = 0
        self.is_applied = False
        self.was_read_early = False
        self.damaged: str | None = None
        self.statistics: dict[str, Tensor] = {}
        self.statistics_at: int | None = None
        self.is_warned_of = False
        self.on_host = on_host
        self.wait: Callable[[], None] = lambda: None
        self._dtype = dtype
        self.dtypes: dict[str, torch.dtype] = {}
        self.live: Sequence[Shard] = ()
        self.tensors: list[Tensor] = []
        self.follow(model_shards)

    @torch.inference_mode(mode=False)  # memory for training, whoever calls
    @torch.no_grad()
    def follow(self, model_shards: ModelShards) -> None:
        """Take up what `ModelShards.follow` found. Not collective.

        What is held for the first time starts with a copy of the live weights; what moved to
        another device is moved there.
        """
        self.learn_dtypes(model_shards)
        known = {(s.fqn, s.box): t for s, t in zip(self.live, self.tensors, strict=True)}
        new = [shard for shard in model_shards.owned if (shard.fqn, shard.box) not in known]
        known |= zip([(shard.fqn, shard.box) for shard in new], self._taken(new), strict=True)
        tensors = [known[shard.fqn, shard.box] for shard in model_shards.owned]
        if not self.on_host:
            tensors = [
                tensor.to(shard.tensor.device)
                for tensor, shard in zip(tensors, model_shards.owned, strict=True)
            ]
        self.live, self.tensors = model_shards.owned, tensors

    def _taken(self, shards: Sequence[Shard]) -> list[Tensor]:
        """Memory for the average of these shards."""
        lives = [shard.tensor for shard in shards]
        dtypes = [self.dtypes[shard.fqn] for shard in shards]
        if self.on_host:
            shapes = [live.shape for live in lives]
            tensors = host_tensors(shapes, dtypes, pinned=are_pinned(lives))
        else:
            pairs = zip(lives, dtypes, strict=True)
            tensors = [torch.empty_like(live, dtype=dtype) for live, dtype in pairs]
        if self.num_updates and tensors:
            torch._foreach_copy_(tensors, lives)
        return tensors

    def learn_dtypes(self, model_shards: ModelShards) -> None:
        """Settle the dtype of each tensor that is held, and keep it from then on."""
        tensors: list[GlobalTensor | LiveTensor] = [*model_shards.catalogue, *model_shards.tensors]
        for tensor in tensors:
            if tensor.is_held:
                self.dtypes.setdefault(tensor.fqn, _average_dtype(tensor.dtype, self._dtype))

    @property
    def name(self) -> str:
        """Its name in the averager."""
        return self.schedule.name

    @property
    def rule(self) -> Rule:
        """The rule as the user gave it."""
        return self.schedule.rule

    @property
    def weight(self) -> float:
        """The weight that the next update will give to the live weights."""
        return self.schedule.resolved_rule.weight(self.num_updates)

    @property
    def nbytes(self) -> int:
        """Bytes of this average on this rank."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def blend(self) -> Blend:
        """What the next update does."""
        rule, num_updates = self.schedule.resolved_rule, self.num_updates
        if num_updates == 0 or not isinstance(rule, Custom):
            return self.weight
        return functools.partial(rule.apply, num_updates=num_updates)

    def own_shards(self) -> list[Shard]:
        """This rank's part of the average: views of the average's own memory."""
        self.wait()
        return [
            Shard(live.fqn, live.box, live.global_shape, tensor)
            for live, tensor in zip(self.live, self.tensors, strict=True)
        ]

    def shards(self) -> list[Shard]:
        """This rank's part of the average: views to be read, wherever the values are now.

        While the average is applied, the views lead into the live weights' storage. Updates under
        way are waited for; later ones change the values.

        Raises:
            StateError: The values are not what they should be; see `damaged`.
        """
        if self.damaged is not None:
            raise StateError(self.damaged)
        self.settle()
        return [
            live if self.is_applied and is_exchanged(live.tensor, own.tensor) else own
            for live, own in zip(self.live, self.own_shards(), strict=True)
        ]

    def contents(self, model_shards: ModelShards) -> dict[str, list[Shard]]:
        """What the model is with this average in place, as far as this rank has it.

        The average's shards, its own statistics, and what it does not hold from the live model.
        """
        contents: dict[str, list[Shard]] = {}
        for shard in self.shards():
            contents.setdefault(shard.fqn, []).append(shard)
        for tensor in model_shards.tensors:
            if not tensor.is_held:
                value = self.statistics.get(tensor.fqn)
                contents[tensor.fqn] = [
                    part if value is None else replace(part, tensor=value.to(part.tensor.dtype))
                    for part in tensor.parts
                ]
        return contents

    def settle(self) -> None:
        """Before the first update, make the memory read as the live weights."""
        if self.num_updates == 0 and self.tensors:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, [live.tensor for live in self.live])


def is_exchanged(live: Tensor, average: Tensor) -> bool:
    """Whether a swap exchanges the two in place; otherwise it keeps a copy of the live values."""
    return live.dtype == average.dtype


def _average_dtype(live: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    if not live.is_floating_point:
        return live
    if dtype is not None:
        return dtype
    return torch.float32 if live in (torch.bfloat16, torch.float16) else live
