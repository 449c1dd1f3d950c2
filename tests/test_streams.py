"""Updates beside training: no write meets a read on another stream without an event between them.

On a pretended accelerator (`races.py`), since what counts is the order that is asked for; the same
loop runs on a real one in test_gpu.py.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from races import Event, Races, Stream, pretended_accelerator
from torch import nn
from torch.optim import SGD, Optimizer

import distavg
from distavg import EMA, Averager, StateError
from distavg.foreach import Lerp
from distavg.offload import _Copy
from distavg.streams import Done, SideStreams, host_tensors


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> Iterator[Races]:
    with pretended_accelerator(monkeypatch) as found:
        yield found


def built(**options: Any) -> tuple[nn.Module, Averager, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    averager = Averager(model, EMA(0.5), **options)
    optimizer = SGD(model.parameters(), lr=0.1)
    averager.attach(optimizer)
    return model, averager, optimizer


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_attached_step_updates_on_another_stream(
    races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, averager, optimizer = built()
    used: list[int] = []
    lerp = torch._foreach_lerp_

    def noted(*args: Any) -> Any:
        used.append(Stream.current.number)
        return lerp(*args)

    monkeypatch.setattr(torch, "_foreach_lerp_", noted)
    train(model, optimizer, 4)
    averager.step()
    # The first is a copy, and the second the first that is known not to be disturbed.
    assert used[0] == used[1] == used[2] != Stream.current.number
    assert used[3] == Stream.current.number  # by hand it stays on the current one
    assert races.found == []


def edit(model: nn.Module, averager: Averager) -> None:
    averager.synchronize()
    with torch.no_grad():
        model[0].weight.zero_()


def apply(model: nn.Module, averager: Averager) -> None:
    with averager.applied():
        model(torch.ones(2, 4))


def evaluate(model: nn.Module, averager: Averager) -> None:
    with averager.evaluating(recalibrate=[torch.randn(4, 4)]):
        model(torch.ones(2, 4))


def move(model: nn.Module, averager: Averager) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    averager.step()


USES: dict[str, Callable[[nn.Module, Averager], object]] = {
    "applied": apply,
    "edited": edit,
    "copied": lambda model, averager: averager.copy_to(),
    "gathered": lambda model, averager: averager.full_state_dict(),
    "read": lambda model, averager: [shard.tensor.sum() for shard in averager["ema"].shards()],
    "updated": lambda model, averager: averager.update(),
    "stepped": lambda model, averager: averager.step(),
    "measured": lambda model, averager: averager.metrics(distance=True),
    "state": lambda model, averager: averager.load_state_dict(averager.state_dict()),
    "moved": move,
    "evaluated": evaluate,
    "taught": lambda model, averager: averager.copy_to(copy.deepcopy(model)),
    "recalibrated": lambda model, averager: averager.recalibrate_batchnorm([torch.randn(4, 4)]),
}


@pytest.mark.parametrize("buffers", ["live", "copied", "averaged"])
@pytest.mark.parametrize("use", USES)
def test_nothing_races_with_an_update(races: Races, use: str, buffers: str) -> None:
    model, averager, optimizer = built(buffers=buffers)
    train(model, optimizer)
    USES[use](model, averager)
    train(model, optimizer)
    USES[use](model, averager)
    assert races.found == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nor_with_one_through_a_temporary(races: Races, dtype: torch.dtype) -> None:
    model, averager, optimizer = built(dtype=dtype)
    train(model, optimizer)
    apply(model, averager)
    train(model, optimizer)
    assert races.found == []


def test_saving_and_loading_race_with_nothing(races: Races, tmp_path: Any) -> None:
    model, averager, optimizer = built()
    train(model, optimizer)
    averager.save(tmp_path / "1")
    train(model, optimizer)
    averager.save(tmp_path / "2", block=False).wait()
    train(model, optimizer)
    averager.load(tmp_path / "1")
    train(model, optimizer)
    assert races.found == []


def test_memory_is_kept_until_the_stream_is_done(
    races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: set[int] = set()
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, stream: kept.add(self.untyped_storage().data_ptr()),
    )
    model, averager, _ = built(dtype=torch.float64)
    shards = averager["ema"].shards()
    assert {shard.tensor.untyped_storage().data_ptr() for shard in shards} < kept
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} < kept
    assert len(kept) == 2 * len(shards) + 1  # and the temporary


def test_nor_with_that_of_another_averager(races: Races) -> None:
    model, _, optimizer = built()
    other = Averager(model, EMA(0.9))
    other.attach(optimizer)
    for _ in range(2):
        train(model, optimizer)
        with other.applied():
            model(torch.ones(2, 4))
        train(model, optimizer)
        other.copy_to()
    assert races.found == []


def test_nor_after_a_use_on_another_stream(races: Races) -> None:
    model, averager, optimizer = built()
    train(model, optimizer)
    other = Stream(torch.device("cpu"))
    with other:
        for shard in averager["ema"].shards():
            shard.tensor.sum()
    Stream.current.wait_event(other.record_event())
    other.clock.clear()
    train(model, optimizer)
    assert races.found == []


def test_nor_after_the_optimizer_was_detached(races: Races) -> None:
    model, averager, _ = built()
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    optimizer.add_param_group({"params": list(model.parameters())})
    averager._hooks._attached.clear()
    handle = averager.attach(optimizer)
    train(model, optimizer)
    handle.remove()
    train(model, optimizer)
    assert races.found == []


def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    forked = SideStreams.forked

    def noted(self: SideStreams) -> Any:
        found.append(1)
        return forked(self)

    monkeypatch.setattr(SideStreams, "forked", noted)
    return found


@pytest.mark.parametrize("are_attached", [True, False])
def test_two_optimizers(races: Races, monkeypatch: pytest.MonkeyPatch, are_attached: bool) -> None:
    found = forks(monkeypatch)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    averager = Averager(model, EMA(0.5))
    # Fused, so that their writes do not show in version counters.
    first, second = (SGD(layer.parameters(), lr=0.1, fused=True) for layer in model)
    averager.attach(*([first, second] if are_attached else [first]))
    for _ in range(4):
        model(torch.ones(2, 4)).sum().backward()
        first.step()
        second.step()
    assert races.found == []
    assert len(found) == (3 if are_attached else 0)  # where another one steps, it stays in line


def test_a_forward_that_writes_to_weights_keeps_updates_in_line(
    races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = forks(monkeypatch)
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 1))
    averager = Averager(model, EMA(0.5))
    optimizer = SGD(model.parameters(), lr=1.0)
    averager.attach(optimizer)
    for _ in range(4):
        model(torch.arange(5)).sum().backward()
        optimizer.step()
    assert races.found == []
    assert found == []


def test_a_write_that_does_not_wait_is_found_and_said(
    races: Races, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, optimizer = built()
    train(model, optimizer)
    with torch.no_grad():
        model[0].weight.zero_()  # without synchronize()
    assert any("zero_" in race for race in races.found)
    with caplog.at_level(logging.WARNING, "distavg"):
        train(model, optimizer)
    assert caplog.text.count("weights were written to between two steps") == 1
    found = forks(monkeypatch)
    train(model, optimizer)
    assert found == []


def test_an_optimizer_that_does_not_wait_is_found(races: Races) -> None:
    model, _, optimizer = built()
    train(model, optimizer)
    optimizer._optimizer_step_pre_hooks.clear()
    train(model, optimizer)
    assert any("add" in race for race in races.found)


def test_a_capture_is_refused(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    model, averager, optimizer = built()
    model(torch.ones(2, 4)).sum().backward()
    before = model[2].weight.detach().clone()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(StateError, match="replayed with this moment's weight"):
        averager.step()
    with pytest.raises(StateError, match="detach the optimizer that is captured"):
        optimizer.step()
    assert torch.equal(model[2].weight, before)  # before the step, which would be captured
    assert averager.step_count == 0


def test_averages_in_host_memory_wait_for_the_copy(races: Races) -> None:
    model, averager, optimizer = built(device="cpu")
    train(model, optimizer, 5)
    averager.synchronize()
    assert Event.waited_for == 5  # by the thread, each update's
    apply(model, averager)
    train(model, optimizer)
    averager.update()
    averager.synchronize()
    assert races.found == []


def test_a_copy_is_waited_for_between_its_queueing_and_its_use(
    races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def note(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def noted(*args: Any) -> Any:
            order.append(name)
            return method(*args)

        monkeypatch.setattr(owner, name, noted)

    _, averager, _ = built(device="cpu")
    for owner, name in ((_Copy, "fill"), (SideStreams, "moment"), (Done, "wait")):
        note(owner, name)
    note(Lerp, "__call__")
    averager.update()
    averager.synchronize()
    assert order == ["fill", "moment", "wait", "__call__"]


def test_the_memory_of_messages_is_kept_too(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: set[int] = set()
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, stream: kept.add(self.untyped_storage().data_ptr()),
    )
    _, averager, _ = built(device="cpu")
    ways = averager._updates._offload._copies[0]._ways
    assert {message.flat.untyped_storage().data_ptr() for message, _ in ways} < kept


def test_the_values_are_those_of_updates_in_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> dict[str, torch.Tensor]:
        model, averager, optimizer = built()
        train(model, optimizer, 4)
        return averager.full_state_dict()

    expected = run()
    with pretended_accelerator(monkeypatch):
        found = run()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_host_tensors_share_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distavg.streams, "_SLAB_BYTES", 256)
    shapes = [(3, 5), (), (0, 2), (100,), (7,)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.bfloat16]
    tensors = host_tensors(shapes, dtypes, pinned=False)
    for value, (tensor, shape, dtype) in enumerate(zip(tensors, shapes, dtypes, strict=True)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
        tensor.fill_(value)
    assert [int(t.sum()) for t in tensors] == [0, 1, 0, 300, 28]
    slabs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(slabs) == 3  # the large one has its own
    assert functools.reduce(max, (t.untyped_storage().nbytes() for t in tensors)) == 400 + 48
