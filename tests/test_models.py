"""The models that the other tests build on: one sequence of weights in every layout."""

from __future__ import annotations

import models
import pytest
import torch
import torch.distributed as dist
from models import Awkward, Uneven, backward, build, set_weights, weights_at, whole_weights
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

CASES = [
    ("ddp", Awkward, 2),
    ("ddp", Uneven, 3),
    *[("fsdp2", Uneven, world_size) for world_size in (1, 2, 3, 4)],
    ("fsdp2-keep", Uneven, 2),
]


def weights_after(layout: str, cls: type[models.TokenModel], step: int) -> dict[str, Tensor]:
    model = build(layout, cls)
    backward(model)
    set_weights(model, weights_at(model, step))
    return whole_weights(model)


def local_sizes() -> dict[str, int]:
    model = build("fsdp2", Uneven)
    return {name: p.to_local().numel() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def live_after_training(layout: str, cls: type[models.TokenModel]) -> list[str]:
    """The names of trainable parameters that two steps of training did not change."""
    model = build(layout, cls)
    before = whole_weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    after = whole_weights(model)
    return [name for name in before if torch.equal(before[name], after[name])]


def keeps_the_root_unsharded(layout: str) -> tuple[bool, bool]:
    """Whether the root, and a nested module, still hold whole parameters after a forward."""
    model = build(layout, Uneven)
    with torch.no_grad():
        model(models.batch())
    return (
        not isinstance(model.get_parameter("one"), DTensor),
        not isinstance(model.get_parameter("block.inner.weight"), DTensor),
    )


def refusal_of(name: str) -> str:
    model = Awkward()
    for other, _ in list(model.named_parameters(recurse=False)):
        if other != name:
            delattr(model, other)
    try:
        fully_shard(model)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("layout", "cls", "world_size"), CASES)
def test_every_layout_holds_the_same_weights(
    layout: str, cls: type[models.TokenModel], world_size: int
) -> None:
    plain = build("plain", cls)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    expected = {**start, **weights_at(plain, 3)}
    for found in run_ranks(weights_after, world_size, layout, cls, 3):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("layout", "cls", "world_size"), CASES)
def test_every_trainable_parameter_trains(
    layout: str, cls: type[models.TokenModel], world_size: int
) -> None:
    assert run_ranks(live_after_training, world_size, layout, cls) == [["frozen"]] * world_size


def test_shards_are_uneven_and_empty() -> None:
    sizes = run_ranks(local_sizes, 4)
    assert [rank["embed.weight"] for rank in sizes] == [8, 8, 4, 0]
    assert [rank["experts"] for rank in sizes] == [20, 20, 20, 0]
    assert [rank["one"] for rank in sizes] == [1, 0, 0, 0]
    assert [rank["block.narrow.weight"] for rank in sizes] == [5, 0, 0, 0]
    assert [rank["frozen"] for rank in sizes] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("layout", "expected"), [("fsdp2", (True, False)), ("fsdp2-keep", (True, True))]
)
def test_what_stays_unsharded(layout: str, expected: tuple[bool, bool]) -> None:
    assert run_ranks(keeps_the_root_unsharded, 2, layout) == [expected] * 2


def test_fsdp2_refuses_the_awkward_ones() -> None:
    assert "scalar" in run_ranks(refusal_of, 1, "scalar")[0]
    assert "contiguous" in run_ranks(refusal_of, 1, "transposed")[0]
    assert run_ranks(refusal_of, 1, "one") == ["accepted"]


def test_weights_depend_on_name_and_step_only() -> None:
    model = Awkward()
    first = weights_at(model, 1)
    shapes = {name: list(tensor.shape) for name, tensor in first.items()}
    again = weights_at(shapes, 1)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["one"], weights_at(model, 2)["one"])
    assert not torch.equal(first["one"], first["scalar"].reshape(1))
    assert "frozen" not in first
    assert "head.weight" not in first  # tied: under its first name only


def test_awkward_is_awkward() -> None:
    model = Awkward()
    assert not model.transposed.is_contiguous()
    assert model.scalar.shape == ()
    assert model.head.weight is model.embed.weight
    assert isinstance(model.module, nn.Linear)
    names = {name for name, _ in model.named_parameters()}
    assert {"module.weight", "one", "frozen"} < names
    assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64, torch.bool}


def test_reset_depends_on_the_seed_alone() -> None:
    model, other = Awkward(), Awkward()
    backward(model)  # moves the batch norm's buffers and the counters
    model.reset(4)
    other.reset(4)
    for (name, tensor), (_, wanted) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(tensor, wanted), name


def bf16_dtypes() -> set[torch.dtype]:
    model = build("fsdp2", Uneven, torch.bfloat16)
    backward(model)
    set_weights(model, weights_at(model, 1))
    return {p.dtype for p in model.parameters()}


def test_build_in_bf16() -> None:
    assert run_ranks(bf16_dtypes, 2) == [{torch.bfloat16}] * 2
    assert build("plain", Awkward, torch.bfloat16).get_buffer("calls").dtype == torch.int64


def test_build_refuses_an_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout 'zero' is not one of"):
        build("zero")
    assert not dist.is_initialized()
