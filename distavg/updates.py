"""The pass that updates averages, where they lie and when the devices come to it.

Updating never communicates, and the host never waits for a device. An update beside training runs
on streams of its own, after the optimizer's kernels: the next forward and backward hide it, and the
next optimizer step, which overwrites the live weights, comes after it. What else writes to them in
between (a forward that normalises weights) would race with it. So the first update is made in line,
and others beside only if, by autograd's version counters, nothing did write until the next step.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from distavg.average import Average
from distavg.errors import StateError
from distavg.foreach import Blend, Lerp, Table
from distavg.offload import Offload
from distavg.shards import ModelShards
from distavg.streams import SideStreams, join_all

__all__ = ["Updates"]

logger = logging.getLogger("distavg")


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
        self._resident = [average for average in averages if not average.on_host]
        self._offloaded = [average for average in averages if average.on_host]
        self._buffers = buffers
        self._streams = SideStreams(())
        self._is_undisturbed: bool | None = None  # by writes between steps; None: not known yet
        self._versions: list[int] = []  # of the live tensors, after an update that may be read
        self._offload: Offload | None = None
        for average in averages:
            average.wait = self.join
        self.follow(model_shards)

    @property
    def num_waits(self) -> int:
        """How many updates in host memory had to wait for one before them."""
        return self._offload.num_waits if self._offload is not None else 0

    @torch.inference_mode(mode=False)
    def follow(self, model_shards: ModelShards) -> None:
        """Take up what `ModelShards.follow` found, in all averages. Not collective."""
        self.join()
        for average in self._averages:
            average.follow(model_shards)
        rows: dict[bool, list[int]] = {}  # of tensors that are averaged, and that are copied
        for index, shard in enumerate(model_shards.owned):
            is_copied = model_shards.by_name[shard.fqn].named.is_buffer and not (
                self._buffers == "averaged" and shard.tensor.is_floating_point()
            )
            rows.setdefault(is_copied, []).append(index)
        self._are_copied = list(rows)
        self._lives = lives = [shard.tensor for shard in model_shards.owned]
        self._is_undisturbed = None
        self._streams = SideStreams(live.device for live in lives)

        def tables(averages: Sequence[Average]) -> list[Table]:
            return [
                Table(
                    [[each.tensors[i] for i in some] for each in averages], [lives[i] for i in some]
                )
                for some in rows.values()
            ]

        self._lerps = [Lerp(*table) for table in tables(self._resident)]
        self._streams.use(lives)
        self._streams.use(tensor for average in self._resident for tensor in average.tensors)
        self._streams.use(tensor for lerp in self._lerps for tensor in lerp.temporaries)
        if self._offloaded:
            num_waits = self.num_waits
            self._offload = None  # its memory is free before more is taken
            self._offload = Offload(tables(self._offloaded), self._streams)
            self._offload.num_waits = num_waits

    def run(self, due: Collection[Average], *, beside: bool = False) -> None:
        """Update these averages. No communication, no waiting for a device.

        Args:
            due: Which.
            beside: Whether it may be beside training, where there is an accelerator, because
                `release` comes before the live weights are written to. Not with buffers, which
                the next forward may write to.

        Raises:
            StateError: An earlier update has failed.
        """
        is_watched = beside and self._streams and self._buffers == "live"
        if is_watched and self._is_undisturbed:
            with self._streams.forked():
                self._queue(due)
        else:
            join_all()
            self._queue(due)
        if is_watched and self._is_undisturbed is not False:
            self._versions = [live._version for live in self._lives]
        for average in due:
            average.num_updates += 1

    def refuse_capture(self) -> None:
        """Raise if a CUDA graph is being captured.

        Raises:
            StateError: A graph is being captured.
        """
        if self._streams and self._streams.is_capturing:
            raise StateError(
                "an update inside the capture of a CUDA graph would be replayed with this moment's "
                "weight, or not at all: detach the optimizer that is captured, and call step() "
                "after each replay"
            )

    def _queue(self, due: Collection[Average]) -> None:
        """Queue the updates on the current streams."""
        if blends := self._blends(due, self._resident):
            for lerp, each in zip(self._lerps, blends, strict=True):
                lerp(each)
        if self._offload is not None and (blends := self._blends(due, self._offloaded)):
            with self._guarded():
                self._offload.run(blends)

    def _blends(
        self, due: Collection[Average], averages: Sequence[Average]
    ) -> list[list[Blend | None]]:
        """What these averages do with the tensors of each table; empty if none is due."""
        blends: list[Blend | None] = [a.blend if a in due else None for a in averages]
        if all(blend is None for blend in blends):
            return []
        copies: list[Blend | None] = [None if blend is None else 1.0 for blend in blends]
        return [copies if is_copied else blends for is_copied in self._are_copied]

    def release(self) -> None:
        """An optimizer is about to write to the live weights. The host does not wait.

        Raises:
            StateError: A graph is being captured.
        """
        self.refuse_capture()
        join_all()
        if not self._versions:
            return
        is_written = self._versions != [live._version for live in self._lives]
        self._versions = []
        if is_written and self._is_undisturbed:
            logger.warning(
                "weights were written to between two steps of the optimizer, perhaps while an "
                "update was reading them: call synchronize() before. Updates stay in line now"
            )
        self._is_undisturbed = not is_written

    def join(self) -> None:
        """Wait for all updates: the host for those in host memory, devices for their own.

        Raises:
            StateError: One has failed.
        """
        join_all()
        self._versions = []  # who calls may write
        if self._offload is not None:
            with self._guarded():
                self._offload.join()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """If an update fails in its thread, nobody knows how far it came."""
        try:
            yield
        except StateError as error:
            for average in self._offloaded:
                average.damaged = (
                    f"average {average.name!r}: {error}, so that its values are a mixture: load a "
                    "checkpoint, or build a new Averager"
                )
            raise StateError(self._offloaded[0].damaged) from error.__cause__
