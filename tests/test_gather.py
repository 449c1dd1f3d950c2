"""Whole tensors, one at a time, and copies into other modules."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import (
    CASES,
    ONCE,
    SIZES,
    communications,
    differences,
    error_of,
    model_class,
    outputs,
    outputs_with,
    same,
    storages,
    timed_error_of,
    torch_average,
    trained,
)
from models import Awkward, Uneven, build, unwrapped, whole_weights
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import distavg


def whole_tensors(layout: str, all_ranks: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict, and the names that the iterator gives this rank, with or without tensor."""
    model, averager = trained(layout, model_class(layout))
    outputs(model)  # an FSDP2 root is unsharded from here on
    names = []
    for name, tensor in averager.iter_full_tensors("ema", all_ranks=all_ranks):
        names.append(name if tensor is not None else f"{name} elsewhere")
        assert tensor is None or tensor.device.type == "cpu"
    return averager.full_state_dict("ema", all_ranks=all_ranks), names


@pytest.mark.parametrize(
    ("layout", "world_size", "all_ranks"),
    [*((*case, False) for case in CASES), ("ddp", 3, True), ("fsdp2", 3, True)],
)
def test_whole_tensors_are_those_of_a_plain_average(
    layout: str, world_size: int, all_ranks: bool
) -> None:
    cls = model_class(layout)
    expected = torch_average(cls, "ema", range(3))
    # The forward above moved the live statistics, which are not held, as it moves a plain model's.
    moved = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "calls"}
    for rank, (found, names) in enumerate(run_ranks(whole_tensors, world_size, layout, all_ranks)):
        if rank == 0 or all_ranks:
            assert set(differences(found, expected)) == moved
            assert set(names) == set(expected)
            fresh = cls()
            fresh.load_state_dict(found)  # strict
            assert fresh.get_parameter("head.weight") is fresh.get_parameter("embed.weight")
        else:
            assert found == {}
            assert set(names) == {f"{name} elsewhere" for name in expected}


def sent_bytes(layout: str) -> tuple[int, int]:
    """The bytes that this rank sends for one state dict on rank 0, and those that it must."""
    model, averager = trained(layout, model_class(layout))
    sent = []
    send = distavg.comm.Comm.send

    def counting(self: Any, tensor: Tensor, rank: int, doing: str) -> None:
        sent.append(tensor.nbytes)
        send(self, tensor, rank, doing)

    with mock.patch.object(distavg.comm.Comm, "send", counting):
        averager.full_state_dict("ema")
    frozen = storages(model)["frozen"].nbytes if layout == "fsdp2" else 0
    return sum(sent), averager["ema"].nbytes + frozen


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_each_element_is_sent_at_most_once(layout: str) -> None:
    """Rank 0 keeps its own part; what it has whole, nobody sends."""
    (sent, _), *others = run_ranks(sent_bytes, 3, layout)
    assert sent == 0
    for sent, needed in others:
        assert sent == (0 if layout == "plain" else needed)


def before_and_inside(layout: str) -> list[str]:
    """Whole tensors before the first update and while another average is applied."""
    cls = model_class(layout)
    model = build(layout, cls)
    averager = distavg.Averager(model, {"a": distavg.EMA(0.5), "b": distavg.EMA(0.5)})
    start = build("plain", cls).state_dict()
    wrong = differences(averager.full_state_dict("a", all_ranks=True), start)
    averager.step()
    before = averager.full_state_dict("a", all_ranks=True)
    with averager.applied("b"):
        wrong += differences(averager.full_state_dict("a", all_ranks=True), before)
    with averager.applied("a"):
        wrong += differences(averager.full_state_dict("a", all_ranks=True), before)
    return wrong


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_whole_tensors_at_odd_moments(layout: str) -> None:
    assert run_ranks(before_and_inside, 2, layout) == [[], []]


def test_whole_tensors_are_copies() -> None:
    model, averager = trained("plain", Awkward)
    before = storages(model)["frozen"].clone()
    for tensor in averager.full_state_dict("ema").values():
        tensor.zero_()
    assert same(storages(model)["frozen"], before)
    assert averager.full_state_dict("ema")["one"].item() != 0


# ---------------------------------------------------------------- copy_to


def teacher_after(layout: str, target_layout: str) -> tuple[list[str], bool, list[str]]:
    """What a teacher holds wrongly, whether it computes rightly, what changed in the live model."""
    cls = model_class(layout) if layout == target_layout else Uneven
    model, averager = trained(layout, cls)
    teacher = build(target_layout, cls, seed=77)
    outputs(teacher)
    outputs(model)
    refs = storages(model)
    before = {name: tensor.clone() for name, tensor in refs.items()}
    averager.copy_to(teacher, "swa")
    expected = torch_average(cls, "swa", range(3))
    found = whole_weights(teacher)
    wrong = differences(found, {name: expected[name] for name in found})
    live_buffers = dict(unwrapped(model).named_buffers())
    wrong += differences(dict(unwrapped(teacher).named_buffers()), live_buffers)
    teacher.eval()
    right = outputs_with(cls, {**expected, **live_buffers}, layout=target_layout)
    is_right = same(outputs(teacher), right)
    return wrong, is_right, differences(refs, before)


def layouts_of(world_size: int) -> list[str]:
    return [layout for layout, sizes in SIZES.items() if world_size in sizes]


@pytest.mark.parametrize(
    ("layout", "target", "world_size"),
    [
        *((layout, "fsdp2", 3) for layout in layouts_of(3)),
        *(("ddp", target, 3) for target in layouts_of(3)),
        *((layout, "plain", 3) for layout in ("ddp", "fsdp2", "fsdp1")),
        *((layout, layout, size) for layout, size in ONCE),
        ("hsdp", "fsdp1-hybrid", 4),
        ("tp-fsdp2", "hsdp", 4),
    ],
)
def test_a_teacher_in_any_layout_gets_the_average(
    layout: str, target: str, world_size: int
) -> None:
    found = run_ranks(teacher_after, world_size, layout, target)
    assert found == [([], True, [])] * world_size


def teacher_collectives(layout: str, target: str) -> tuple[int, int]:
    """Collectives of copying to a teacher: beyond the one that tells how it went, and bytes."""
    _, averager = trained(layout, Uneven)
    teacher = build(target, Uneven, seed=77)
    vote = communications(lambda: averager._comm.raise_together(None, "x"))
    counted = communications(lambda: averager.copy_to(teacher, "swa"))
    return counted - vote, vote


@pytest.mark.parametrize(
    "layout", ["plain", "fsdp2", "fsdp2-keep", "fsdp1", "fsdp1-flat", "fsdp1-grad-op"]
)
def test_nothing_is_communicated_between_equal_layouts(layout: str) -> None:
    for beyond, vote in run_ranks(teacher_collectives, 2, layout, layout):
        assert beyond == -vote  # none at all
        assert vote > 0  # the check can count
    other = "fsdp2" if layout == "plain" else "ddp"
    for beyond, _ in run_ranks(teacher_collectives, 2, layout, other):
        assert beyond > 0


def teacher_that_differs(change: str) -> str:
    _, averager = trained("fsdp2", Uneven)
    teacher = Uneven()
    if dist.get_rank() == 1 or change != "one rank":
        if change == "shape":
            teacher.one = nn.Parameter(torch.zeros(2))
        else:
            teacher.extra = nn.Parameter(torch.zeros(2))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    text = error_of(averager.copy_to, teacher, "swa")
    assert differences(dict(teacher.named_parameters()), before) == []
    return text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", "one has shape (1,) in the averaged model and (2,) in the target"),
        ("name", "only the target has a tensor extra"),
        ("one rank", "only the target has a tensor extra"),
    ],
)
def test_a_teacher_of_another_model_is_refused_on_all_ranks(change: str, message: str) -> None:
    for text in run_ranks(teacher_that_differs, 2, change):
        assert text.startswith("ModelMismatch: ")
        assert message in text


def teacher_unlike_on_one_rank(layout: str, change: str) -> tuple[str, float]:
    _, averager = trained(layout, Uneven, timeout=timedelta(seconds=20))
    teacher: Any = build(layout, Uneven, seed=77)
    if dist.get_rank() == 1:
        if change == "extra":
            unwrapped(teacher).extra = nn.Parameter(torch.zeros(2))
        else:
            teacher = nn.Linear(2, 2, device="meta")
    return timed_error_of(averager.copy_to, teacher, "swa")


@pytest.mark.parametrize("change", ["extra", "meta"])
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_a_teacher_that_is_another_on_one_rank_is_an_error_at_once(
    layout: str, change: str
) -> None:
    """On all ranks where they meet; otherwise on that one, and the others need nobody."""
    found = run_ranks(teacher_unlike_on_one_rank, 2, layout, change)
    expected = "only the target has a tensor extra" if change == "extra" else "on the meta device"
    assert expected in found[1][0]
    assert expected in found[0][0] if layout == "ddp" else found[0][0] == "nothing"
    assert max(seconds for _, seconds in found) < 10


def untied_teacher() -> list[str]:
    """A teacher in the same layout whose tied tensors are two."""
    _, averager = trained("fsdp2", Uneven)
    teacher = Uneven()
    teacher.head.weight = nn.Parameter(torch.zeros_like(teacher.head.weight))
    fully_shard(teacher)
    averager.copy_to(teacher, "swa")
    expected = averager.full_state_dict("swa", all_ranks=True)
    found = {n: p.full_tensor() for n, p in teacher.named_parameters()}
    return differences(found, {n: expected[n] for n in found})


def test_a_teacher_may_have_two_tensors_for_one_that_is_tied() -> None:
    assert run_ranks(untied_teacher, 2) == [[], []]


def permanent(layout: str) -> tuple[list[str], bool, str]:
    cls = model_class(layout)
    model, averager = trained(layout, cls)
    outputs(model)
    averager.copy_to(name="swa")
    expected = torch_average(cls, "swa", range(3))
    found = whole_weights(model)
    wrong = differences(found, {name: expected[name] for name in found})
    average = averager.full_state_dict("swa", all_ranks=True)
    wrong += differences({n: average[n] for n in found}, {n: expected[n] for n in found})
    model.eval()
    live_buffers = dict(unwrapped(model).named_buffers())
    is_right = same(outputs(model), outputs_with(cls, {**expected, **live_buffers}, layout=layout))
    return wrong, is_right, error_of(averager.step)


@pytest.mark.parametrize(("layout", "world_size"), ONCE)
def test_the_live_model_may_become_the_average_for_good(layout: str, world_size: int) -> None:
    assert run_ranks(permanent, world_size, layout) == [([], True, "nothing")] * world_size


def test_a_teacher_may_be_untied_where_the_student_is_tied() -> None:
    _, averager = trained("plain", Uneven)
    teacher = Uneven()
    teacher.head.weight = nn.Parameter(torch.empty_like(teacher.embed.weight))
    averager.copy_to(teacher, "swa")
    expected = torch_average(Uneven, "swa", range(3))
    assert same(teacher.head.weight.detach(), expected["embed.weight"])
    assert same(teacher.embed.weight.detach(), expected["embed.weight"])


def empty_in_fsdp1() -> list[tuple[int, ...]]:
    model = nn.Sequential(nn.Linear(3, 2))
    model.nothing = nn.Parameter(torch.empty(0, 3))
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    averager = distavg.Averager(sharded, distavg.EMA())
    averager.step()
    return [tuple(t.shape) for t in averager.full_state_dict(all_ranks=True).values()]


def test_a_tensor_without_elements_that_no_rank_has() -> None:
    for shapes in run_ranks(empty_in_fsdp1, 2):
        assert (0, 3) in shapes
