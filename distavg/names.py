"""Canonical fully qualified names (FQNs) of a model's tensors.

Wrappers add levels to the names: DDP's `module.`, FSDP1's `_fsdp_wrapped_module.`,
`torch.compile`'s `_orig_mod.`. They are stripped by the type of the module that adds them, never
by matching text, so that a child that is really called `module` keeps its name.
"""

import sys
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from distavg.errors import ConfigError

__all__ = ["WRAPPER_LEVELS", "Flattened", "NamedTensor", "named_tensors", "unwrapped"]

# Each wrapper that is a level of its own, and the attribute that holds the wrapped module.
_WRAPPERS: dict[type[nn.Module], str] = {
    DistributedDataParallel: "module",
    nn.DataParallel: "module",
    FullyShardedDataParallel: "_fsdp_wrapped_module",
    CheckpointWrapper: "_checkpoint_wrapped_module",
}
_COMPILED = "_orig_mod"

# Names of levels that no model has of its own, for other systems' files, where there is only text.
WRAPPER_LEVELS = frozenset({*_WRAPPERS.values(), _COMPILED} - {"module"})


@dataclass(frozen=True, slots=True)
class Flattened:
    """A parameter that FSDP1 has moved into a flat one.

    Attributes:
        flat: The flat parameter.
        index: The number of the original parameter within it.
        tensor: The original parameter if FSDP1 kept it (`use_orig_params=True`), else `flat`.
    """

    flat: Tensor
    index: int
    tensor: Tensor


# For each module that has some: the parameters that are registered elsewhere, by their name in it.
Elsewhere = Mapping[nn.Module, Mapping[str, Flattened]]


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A parameter or persistent buffer as it is registered in the model.

    Attributes:
        fqn: The canonical name; of tied tensors the first.
        aliases: The other canonical names of the same tensor.
        tensor: What the module holds: a plain tensor or a DTensor.
        is_buffer: Whether it is a buffer.
        owner: The module that registers it under `fqn`.
        key: Its name in `owner`.
        ddp: The DDP wrapper around it, if there is one.
        flattened: Where it is, if FSDP1 has moved it.
    """

    fqn: str
    aliases: tuple[str, ...]
    tensor: Tensor
    is_buffer: bool
    owner: nn.Module
    key: str
    ddp: DistributedDataParallel | None
    flattened: Flattened | None = None

    @property
    def identity(self) -> Hashable:
        """Equal for two registrations of one tensor."""
        if self.flattened is not None:
            return id(self.flattened.flat), self.flattened.index
        return id(self.tensor)


def named_tensors(
    model: nn.Module | Mapping[str, nn.Module], elsewhere: Elsewhere = MappingProxyType({})
) -> list[NamedTensor]:
    """Every parameter and persistent buffer of a model once, in the model's order.

    Args:
        model: A module, or a mapping of prefix to module whose names get that prefix.
        elsewhere: The parameters that FSDP1 has moved.

    Raises:
        ConfigError: Two different tensors have one canonical name.
    """
    if isinstance(model, nn.Module):
        found = list(_walk(model, "", elsewhere))
    else:
        found = [
            each
            for prefix, stage in model.items()
            for each in _walk(stage, f"{prefix}.", elsewhere)
        ]
    by_name: dict[str, Hashable] = {}
    for each in found:
        if by_name.setdefault(each.fqn, each.identity) != each.identity:
            raise ConfigError(f"{each.fqn}: two different tensors have this canonical name")
    firsts: dict[Hashable, NamedTensor] = {}
    aliases: dict[Hashable, list[str]] = {}
    for each in found:
        first = firsts.setdefault(each.identity, each)
        known = aliases.setdefault(each.identity, [])
        if each.fqn != first.fqn and each.fqn not in known:
            known.append(each.fqn)
    return [
        replace(each, aliases=tuple(aliases[key])) if aliases[key] else each
        for key, each in firsts.items()
    ]


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the wrappers around it."""
    while (attribute := _wrapped_attribute(module)) is not None:
        module = getattr(module, attribute)
    return module


def _walk(model: nn.Module, prefix: str, elsewhere: Elsewhere) -> Iterator[NamedTensor]:
    """Every registration of a parameter or persistent buffer, under its canonical name."""
    levels: dict[str, tuple[str, nn.Module, DistributedDataParallel | None]] = {}
    flats = {id(each.flat) for moved in elsewhere.values() for each in moved.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        parent_path, _, key = path.rpartition(".")
        if not path:
            name, ddp = prefix, None
        else:
            parent_name, parent, ddp = levels[parent_path]
            is_wrapped = key == _wrapped_attribute(parent)
            name = parent_name if is_wrapped else f"{parent_name}{key}."
        if isinstance(module, DistributedDataParallel):
            ddp = module
        levels[path] = name, module, ddp
        moved = elsewhere.get(module, {})
        for key, place in moved.items():
            yield NamedTensor(name + key, (), place.tensor, False, module, key, ddp, place)
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if key not in moved and id(parameter) not in flats:
                yield NamedTensor(name + key, (), parameter, False, module, key, ddp)
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if key not in module._non_persistent_buffers_set:
                yield NamedTensor(name + key, (), buffer, True, module, key, ddp)


def _wrapped_attribute(module: nn.Module) -> str | None:
    if type(module).__name__ == "OptimizedModule":
        # torch.compile's wrapper is private and its module slow to import (0.4 s): look only
        # where something has imported it already.
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            return _COMPILED
    return next((attr for kind, attr in _WRAPPERS.items() if isinstance(module, kind)), None)
