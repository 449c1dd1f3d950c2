"""What is known of a model's tensors on this rank: records that tie no module to a wrapper."""

import itertools
import operator
from collections.abc import Hashable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distavg.layout import Box
from distavg.names import NamedTensor

__all__ = ["Anchor", "LiveTensor", "Shard", "Watch"]


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of one global tensor and where it lies.

    Attributes:
        fqn: Canonical name.
        box: The rectangle of the global tensor.
        global_shape: Shape of the whole tensor.
        tensor: The local view that holds the box, of shape `box.sizes`.
    """

    fqn: str
    box: Box
    global_shape: tuple[int, ...]
    tensor: Tensor

    def part(self, box: Box) -> "Shard":
        """The shard at a box, in global coordinates, that lies in this one."""
        if box == self.box:
            return self
        view = self.tensor[box.relative_to(self.box).slices()]
        return Shard(self.fqn, box, self.global_shape, view)


@dataclass(slots=True)
class LiveTensor:
    """A parameter or buffer of the model as this rank holds it.

    Attributes:
        named: Its registration in the model.
        parts: What this rank has of it, in detached views of the storage that lasts.
        global_shape: Shape of the whole tensor.
        dtype: Its dtype.
        layout: How it is spread over the ranks: equal on all ranks if it is equal on one.
        is_alike: Whether ranks that have the same boxes of it are known to hold the same values.
        alike_on: Global ranks that must have the same boxes of it.
        groups: Process groups that may move it between replicas.
        anchor: Where to look whether the storage is still the same.
        is_held: Whether averages hold it; frozen, excluded and live-buffer tensors are not held.
        holders: The global ranks that have the same boxes of it; this one, if it has none.
        is_copied: Whether each of the holders averages what it has, of which the first's counts.
    """

    named: NamedTensor
    parts: tuple[Shard, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Hashable
    is_alike: bool
    alike_on: frozenset[int]
    groups: tuple[dist.ProcessGroup, ...]
    anchor: "Anchor"
    is_held: bool = False
    holders: tuple[int, ...] = ()
    is_copied: bool = False

    @property
    def fqn(self) -> str:
        """Canonical name."""
        return self.named.fqn

    @property
    def names(self) -> tuple[str, ...]:
        """All its canonical names, that of a tied tensor's first registration before others."""
        return (self.named.fqn, *self.named.aliases)

    @property
    def boxes(self) -> list[Box]:
        """Where the parts are in the global tensor."""
        return [part.box for part in self.parts]

    @property
    def is_divided(self) -> bool:
        """Whether the holders divide it, so that none of them averages all that it has."""
        return len(self.holders) > 1 and not self.is_copied

    @property
    def versioned(self) -> list[Tensor]:
        """The tensors whose version counters advance when it is written to."""
        kept = self.named.flattened
        return [self.named.tensor, *([kept.flat] if kept else []), *(p.tensor for p in self.parts)]


@dataclass(frozen=True, slots=True)
class Anchor:
    """A place that leads to the storage of a tensor without a walk over the model.

    Attributes:
        table: The `__dict__`, or the like, that holds the tensor.
        key: Its key there.
        address: Where the storage was.
        within: The attribute of the tensor there that has the storage; None: itself.
        before: What to look at as long as the tensor is not there.
    """

    table: MutableMapping[str, Any]
    key: str
    address: int
    within: str | None = None
    before: Tensor | None = None


class Watch:
    """Whether tensors still have the storage that they had, and modules their children.

    Costs about 0.1 µs for each tensor, or 0.5 µs when the caches are cold.

    Args:
        anchors: The places to look at.
        modules: The modules; none of their children may be replaced, added or removed.
    """

    def __init__(self, anchors: Iterable[Anchor], modules: Iterable[nn.Module] = ()) -> None:
        self._families = [module._modules for module in modules if module._modules]
        self._children = [child for family in self._families for child in family.values()]
        known = list({(id(anchor.table), anchor.key): anchor for anchor in anchors}.values())
        plain = [each for each in known if each.within is None and each.before is None]
        self._tables = [anchor.table for anchor in plain]
        self._keys = [anchor.key for anchor in plain]
        self._addresses = [anchor.address for anchor in plain]
        sharded = [(each, each.within) for each in known if each.within is not None]
        self._sharded = [(each.table, each.key, within) for each, within in sharded]
        self._sharded_addresses = [anchor.address for anchor, _ in sharded]
        self._lazy = [anchor for anchor in known if anchor.before is not None]

    def is_current(self) -> bool:
        """Whether all storage is where it was, and all modules."""
        # As much as can be in C, and in one place: between two steps the caches turn cold, and
        # what counts is how much memory, code included, is looked at.
        try:
            return (
                [*map(Tensor.data_ptr, map(operator.getitem, self._tables, self._keys))]
                == self._addresses
                and [*itertools.chain.from_iterable(map(dict.values, self._families))]
                == self._children
                and (not self._sharded or self._has_sharded())
                and (not self._lazy or self._has_lazy())
            )
        except (KeyError, AttributeError, TypeError, RuntimeError):  # not there, or another kind
            return False

    def _has_sharded(self) -> bool:
        addresses = [getattr(table[key], name).data_ptr() for table, key, name in self._sharded]
        return addresses == self._sharded_addresses

    def _has_lazy(self) -> bool:
        return all(
            each.table.get(each.key, each.before).data_ptr() == each.address for each in self._lazy
        )
