"""Averages: a rule, its counter, and this rank's shards; and the pass that updates them.

Updating never communicates. An average before its first update reads as the live weights.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distavg.errors import ConfigError
from distavg.foreach import Blend, Lerp
from distavg.rules import Custom, Rule
from distavg.schedule import Schedule
from distavg.shards import GlobalTensor, ModelShards
from distavg.tensors import LiveTensor, Shard

__all__ = ["Average", "Updates"]


class Average:
    """A running average of the live weights, as this rank holds it.

    Memory is taken here: one tensor beside each owned shard of the live weights.

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

    Args:
        schedule: The rule under the averager's clock.
        model_shards: The live tensors.
        dtype: The dtype to average floating tensors in; None for fp32 in place of bf16 and fp16,
            and each tensor's own otherwise.
    """

    def __init__(
        self, schedule: Schedule, model_shards: ModelShards, *, dtype: torch.dtype | None
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
        tensors: list[Tensor] = []
        for shard in model_shards.owned:
            live, tensor = shard.tensor, known.get((shard.fqn, shard.box))
            if tensor is None:
                tensor = torch.empty_like(live, dtype=self.dtypes[shard.fqn])
                if self.num_updates:
                    tensor.copy_(live)
            tensors.append(tensor.to(live.device))
        self.live, self.tensors = model_shards.owned, tensors

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
        return [
            Shard(live.fqn, live.box, live.global_shape, tensor)
            for live, tensor in zip(self.live, self.tensors, strict=True)
        ]

    def shards(self) -> list[Shard]:
        """This rank's part of the average: views to be read, wherever the values are now.

        While the average is applied, the views lead into the live weights' storage.
        """
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


class Updates:
    """Updates some of several averages in one pass over the live weights.

    Args:
        averages: Averages of one model.
        model_shards: Its live tensors.
        buffers: `"live"`, `"copied"` or `"averaged"`: what updates do to floating buffers.
    """

    def __init__(
        self, averages: Sequence[Average], model_shards: ModelShards, *, buffers: str
    ) -> None:
        self._averages = averages
        self._buffers = buffers
        self.follow(model_shards)

    @torch.inference_mode(mode=False)
    def follow(self, model_shards: ModelShards) -> None:
        """Take up what `ModelShards.follow` found, in all averages. Not collective."""
        for average in self._averages:
            average.follow(model_shards)
        averaged: list[int] = []
        copied: list[int] = []
        for index, shard in enumerate(model_shards.owned):
            is_copied = model_shards.by_name[shard.fqn].named.is_buffer and not (
                self._buffers == "averaged" and shard.tensor.is_floating_point()
            )
            (copied if is_copied else averaged).append(index)
        self._averaged, self._copied = (
            Lerp(
                [[average.tensors[i] for i in indices] for average in self._averages],
                [model_shards.owned[i].tensor for i in indices],
            )
            for indices in (averaged, copied)
        )

    def run(self, due: Collection[Average]) -> None:
        """Update these averages, now. No communication, no device synchronisation."""
        self._averaged([each.blend if each in due else None for each in self._averages])
        self._copied([1.0 if each in due else None for each in self._averages])
        for average in due:
            average.num_updates += 1


def is_exchanged(live: Tensor, average: Tensor) -> bool:
    """Whether a swap exchanges the two in place; otherwise it keeps a copy of the live values."""
    return live.dtype == average.dtype


def _average_dtype(live: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    if not live.is_floating_point:
        return live
    if dtype is not None:
        return dtype
    return torch.float32 if live in (torch.bfloat16, torch.float16) else live
