"""Canonical names: wrappers add levels, and are seen by their type, never by their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Awkward
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distavg.errors import ConfigError
from distavg.names import NamedTensor, named_tensors


def names(model: Any) -> list[str]:
    return [each.fqn for each in named_tensors(model)]


def by_name(model: Any) -> dict[str, NamedTensor]:
    return {each.fqn: each for each in named_tensors(model)}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


SMALL = [
    "0.weight",
    "0.bias",
    "1.weight",
    "1.bias",
    "1.running_mean",
    "1.running_var",
    "1.num_batches_tracked",
]


class Named(nn.Module):
    """A child, a parameter and a buffer of the caller's names."""

    def __init__(self, name: str, child: nn.Module | None = None) -> None:
        super().__init__()
        self.add_module(name, child or nn.Linear(2, 2, bias=False))
        self.register_parameter("own", nn.Parameter(torch.ones(2)))
        self.register_buffer("steps", torch.zeros(()))


def in_ddp(model: nn.Module) -> nn.Module:
    """DDP's module tree without a process group: what named_tensors looks at is the type."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def compiled(model: nn.Module) -> nn.Module:
    """Nothing is compiled before the first forward; the eager backend is quick to import."""
    wrapped: nn.Module = torch.compile(model, backend="eager")
    return wrapped


def inner_checkpointed(model: nn.Module) -> nn.Module:
    return nn.Sequential(*map(checkpoint_wrapper, model.children()))


def inner_compiled(model: nn.Module) -> nn.Module:
    return nn.Sequential(*map(compiled, model.children()))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.DataParallel,
        in_ddp,
        compiled,
        checkpoint_wrapper,
        inner_checkpointed,
        inner_compiled,
        lambda model: compiled(in_ddp(model)),
        lambda model: in_ddp(compiled(model)),
        lambda model: in_ddp(compiled(inner_checkpointed(model))),
    ],
)
def test_wrappers_leave_no_trace(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert names(wrap(small())) == SMALL == list(small().state_dict())


@pytest.mark.parametrize(
    "name", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
@pytest.mark.parametrize("wrap", [lambda model: model, in_ddp, compiled, checkpoint_wrapper])
def test_a_real_child_keeps_its_name(name: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    inner = Named(name, Named(name))
    expected = ["own", "steps", f"{name}.own", f"{name}.steps", f"{name}.{name}.weight"]
    assert names(wrap(inner)) == expected


def test_a_module_that_only_calls_itself_optimized_keeps_its_name() -> None:
    class OptimizedModule(Named):
        pass

    assert "_orig_mod.weight" in names(OptimizedModule("_orig_mod"))


def test_a_wrappers_own_parameters_and_children() -> None:
    # A subclass of a wrapper may hold more than what it wraps.
    wrapper = in_ddp(small())
    wrapper.extra = nn.Linear(1, 1, bias=False)
    wrapper.register_parameter("scale", nn.Parameter(torch.ones(())))
    assert names(wrapper) == ["scale", *SMALL, "extra.weight"]


def test_two_tensors_of_one_canonical_name() -> None:
    wrapper = in_ddp(nn.Linear(1, 1))
    wrapper.register_parameter("weight", nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError) as caught:
        named_tensors(wrapper)
    assert str(caught.value) == "weight: two different tensors have this canonical name"


def test_tied_tensors_are_one_with_several_names() -> None:
    model = Awkward()
    found = by_name(model)
    assert found["embed.weight"].aliases == ("head.weight",)
    assert "head.weight" not in found
    assert all(not each.aliases for name, each in found.items() if name != "embed.weight")
    assert found["embed.weight"].owner is model.embed


def test_a_tied_module_is_walked_under_each_of_its_names() -> None:
    layer = nn.Linear(1, 1)
    found = by_name(nn.ModuleDict({"a": layer, "b": layer, "c": compiled(layer)}))
    assert {name: each.aliases for name, each in found.items()} == {
        "a.weight": ("b.weight", "c.weight"),
        "a.bias": ("b.bias", "c.bias"),
    }


def test_what_is_registered() -> None:
    model = Awkward()
    found = by_name(model)
    state = model.state_dict()
    assert set(found) | {"head.weight"} == set(state)
    parameters = dict(model.named_parameters())
    for name, each in found.items():
        assert each.is_buffer is (name not in parameters)
        assert each.tensor is (model.get_buffer(name) if each.is_buffer else parameters[name])
        assert each.ddp is None


def test_non_persistent_buffers_are_left_out() -> None:
    model = Named("child")
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    assert names(model) == ["own", "steps", "child.weight"]


def test_none_parameters_are_left_out() -> None:
    assert names(nn.Linear(2, 2, bias=False)) == ["weight"]


def test_a_mapping_of_prefixes() -> None:
    first, second = nn.Linear(1, 1), compiled(nn.Linear(1, 1))
    assert names({"stage.0": first, "stage.1": second}) == [
        "stage.0.weight",
        "stage.0.bias",
        "stage.1.weight",
        "stage.1.bias",
    ]
    assert by_name({"a": first, "b": first})["a.weight"].aliases == ("b.weight",)


def test_the_ddp_around_each_tensor() -> None:
    wrapper = in_ddp(nn.Linear(1, 1))
    model = nn.Sequential(wrapper, nn.Linear(1, 1), in_ddp(compiled(nn.Linear(1, 1))))
    found = by_name(model)
    assert {name: each.ddp for name, each in found.items()} == {
        "0.weight": wrapper,
        "0.bias": wrapper,
        "1.weight": None,
        "1.bias": None,
        "2.weight": model[2],
        "2.bias": model[2],
    }
    assert found["0.weight"].owner is wrapper.module


def names_of_wrapped() -> list[list[str]]:
    """On one rank: the real wrappers around Awkward, or what they accept of it."""
    ddp = DistributedDataParallel(Awkward())
    optimized = compiled(DistributedDataParallel(Awkward()))
    sharded = fully_shard(checkpoint_wrapper(small()))
    assert all(each.ddp is ddp for each in named_tensors(ddp))
    assert dist.get_world_size() == 1
    return [names(ddp), names(optimized), names(sharded)]


def test_the_real_wrappers() -> None:
    plain = names(Awkward())
    assert run_ranks(names_of_wrapped, 1) == [[plain, plain, SMALL]]
