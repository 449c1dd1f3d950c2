"""Averages in host memory: the values of averages beside the weights, made by a thread."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import (
    cloned,
    differences,
    error_of,
    model_class,
    same,
    storages,
    torch_average,
    trained,
)
from models import Awkward, Uneven, weights_at
from ranks import run_ranks
from torch import Tensor, nn

from distavg import EMA, SWA, Averager, ConfigError, Custom, StateError, UnsupportedError, foreach


def wrong_averages(layout: str, max_bytes: int | None = None) -> list[str]:
    """What differs from PyTorch's average, and what of the weights an evaluation changes."""
    with pytest.MonkeyPatch.context() as patch:
        if max_bytes is not None:  # tensors travel in many messages, and in parts
            patch.setattr(foreach, "_CPU_CHUNK_BYTES", max_bytes)
        cls = model_class(layout)
        model, averager = trained(layout, cls, range(5), device="cpu")
        wrong = []
        for name in averager.names:
            expected = torch_average(cls, name, range(5))
            found = averager.full_state_dict(name, all_ranks=True)
            wrong += [f"{name}: {fqn}" for fqn in differences(found, expected)]
            before = cloned(storages(model))
            with averager.applied(name):
                applied = averager.full_state_dict(name, all_ranks=True)
            wrong += [f"applied {name}: {fqn}" for fqn in differences(applied, expected)]
            wrong += differences(storages(model), before)
        return wrong


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ("ddp", 3),
        ("fsdp2", 3),
        ("fsdp2-half", 4),
        ("hsdp", 4),
        ("fsdp1", 3),
        ("fsdp1-flat", 2),
        ("tp", 2),
        ("tp-fsdp2", 4),
    ],
)
def test_every_kind_of_layout_gives_the_bits_of_torch(layout: str, world_size: int) -> None:
    assert run_ranks(wrong_averages, world_size, layout) == [[]] * world_size


@pytest.mark.parametrize("max_bytes", [1, 24, 100])
def test_whatever_the_size_of_a_message(max_bytes: int) -> None:
    assert wrong_averages("plain", max_bytes) == []


def saved_and_loaded(path: str, device: str | None, other: str | None) -> list[str]:
    _, averager = trained("fsdp2", Uneven, range(3), device=device)
    averager.save(path)
    _, resumed = trained("ddp", Uneven, (), device=other)
    resumed.load(path)
    expected = torch_average(Uneven, "ema", range(3))
    return differences(resumed.full_state_dict("ema", all_ranks=True), expected)


@pytest.mark.parametrize(("device", "other"), [("cpu", None), (None, "cpu"), ("cpu", "cpu")])
def test_checkpoints_know_no_places(tmp_path: Any, device: str | None, other: str | None) -> None:
    assert run_ranks(saved_and_loaded, 2, str(tmp_path / "c"), device, other) == [[]] * 2


class Gate:
    """A rule's function that waits until it is let through."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.calls = 0

    def __call__(self, averaged: list[Tensor], live: list[Tensor], num_updates: int) -> None:
        assert self.opened.wait(30)
        self.calls += 1
        torch._foreach_copy_(averaged, live)


def stepped(model: nn.Module, averager: Averager, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    averager.step()


def test_training_waits_only_when_it_laps_the_thread() -> None:
    gate, model = Gate(), nn.Linear(2, 2)
    averager = Averager(model, {"a": Custom(multi_avg_fn=gate)}, device="cpu")
    for value in range(3):  # the first update is a copy, which needs no function
        stepped(model, averager, value)
    assert gate.calls == 0
    assert averager.metrics()["offload_waits"] in (0, 1)  # whether the copy was made by then
    waits = averager.metrics()["offload_waits"]
    threading.Timer(0.2, gate.opened.set).start()
    stepped(model, averager, 3.0)
    assert averager.metrics()["offload_waits"] == waits + 1
    assert averager["a"].num_updates == 4
    assert all((shard.tensor == 3.0).all() for shard in averager["a"].shards())
    assert gate.calls == 3


def test_weights_may_change_as_soon_as_a_step_returns() -> None:
    gate, model = Gate(), nn.Linear(2, 2)
    averager = Averager(model, {"a": Custom(multi_avg_fn=gate)}, device="cpu")
    stepped(model, averager, 0.0)
    stepped(model, averager, 1.0)
    with torch.no_grad():
        model.weight.fill_(9.0)
    gate.opened.set()
    assert (averager["a"].shards()[0].tensor == 1.0).all()


USES: dict[str, Callable[[Averager], object]] = {
    "read": lambda averager: averager["a"].shards(),
    "gathered": lambda averager: averager.full_state_dict(),
    "applied": lambda averager: averager.applied().__enter__(),
    "synchronized": lambda averager: averager.synchronize(),
    "state": lambda averager: averager.state_dict(),
    "saved": lambda averager: averager.save("nowhere"),
}


@pytest.mark.parametrize("use", USES)
def test_an_error_in_the_thread_is_raised_at_the_next_use(use: str) -> None:
    def fail(averaged: Tensor, live: Tensor, num_updates: int) -> Tensor:
        raise ZeroDivisionError("in the rule")

    model = nn.Linear(2, 2)
    averager = Averager(model, {"a": Custom(avg_fn=fail)}, device="cpu")
    averager.step()
    averager.step()
    with pytest.raises(StateError, match=r"average 'a'.*failed \(ZeroDivisionError: in the"):
        USES[use](averager)
    with pytest.raises(StateError, match="load a checkpoint, or build a new Averager"):
        averager.step()


def test_steps_alone_hear_of_an_error_too() -> None:
    def fail(averaged: Tensor, live: Tensor, num_updates: int) -> Tensor:
        raise ZeroDivisionError("in the rule")

    averager = Averager(nn.Linear(2, 2), {"a": Custom(avg_fn=fail)}, device="cpu")

    def train() -> None:
        for _ in range(5):  # two updates are under way, and a third waits for the first
            averager.step()

    with pytest.raises(StateError, match="ZeroDivisionError: in the rule") as caught:
        train()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert averager["a"].num_updates < 5


@pytest.mark.parametrize("is_told", [True, False])
def test_a_checkpoint_heals(tmp_path: Any, is_told: bool) -> None:
    is_failing = False

    def rule(averaged: Tensor, live: Tensor, num_updates: int) -> Tensor:
        if is_failing:
            raise SystemExit(3)
        return live

    model = nn.Linear(2, 2)
    averager = Averager(model, {"a": Custom(avg_fn=rule)}, device="cpu")
    stepped(model, averager, 1.0)
    averager.save(tmp_path / "good")
    is_failing = True
    averager.update()
    averager.update()
    if is_told:
        for use in (averager.synchronize, averager["a"].shards, averager.full_state_dict):
            with pytest.raises(StateError, match="SystemExit: 3"):
                use()
    averager.load(tmp_path / "good", rules="current")
    assert (averager["a"].shards()[0].tensor == 1.0).all()
    is_failing = False
    stepped(model, averager, 2.0)
    assert (averager["a"].shards()[0].tensor == 2.0).all()


def test_a_rule_that_calls_its_averager_is_an_error() -> None:
    def rule(averaged: Tensor, live: Tensor, num_updates: int) -> Tensor:
        return averager["a"].shards()[0].tensor

    averager = Averager(nn.Linear(2, 2), {"a": Custom(avg_fn=rule)}, device="cpu")
    averager.step()
    averager.step()
    with pytest.raises(StateError, match="called its own averager"):
        averager.synchronize()


def failing_on_one_rank(use: str) -> str:
    def rule(averaged: Tensor, live: Tensor, num_updates: int) -> Tensor:
        if dist.get_rank() == 1:
            raise ZeroDivisionError
        return live

    rules = {"a": Custom(avg_fn=rule)}
    _, averager = trained("fsdp2", Uneven, (), rules=rules, device="cpu")
    averager.step()
    averager.step()
    call: Callable[[], object] = {
        "measured": lambda: averager.metrics(distance=True),
        "taught": lambda: averager.copy_to(Uneven()),
        "gathered": averager.full_state_dict,
        "saved": lambda: averager.save("nowhere"),
    }[use]
    return error_of(call)


@pytest.mark.parametrize("use", ["measured", "taught", "gathered", "saved"])
def test_an_error_on_one_rank_is_raised_on_all(use: str) -> None:
    for text in run_ranks(failing_on_one_rank, 2, use):
        assert text.startswith("StateError: ")
        assert "average 'a': an update in host memory failed (ZeroDivisionError" in text


def test_an_interrupt_while_waiting_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, model = Gate(), nn.Linear(2, 2)
    averager = Averager(model, {"a": Custom(multi_avg_fn=gate)}, device="cpu")
    for value in range(3):
        stepped(model, averager, value)

    def interrupted(futures: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distavg.offload.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            averager.synchronize()
    gate.opened.set()
    stepped(model, averager, 3.0)
    assert (averager["a"].shards()[0].tensor == 3.0).all()


def test_places_by_name() -> None:
    model = Awkward()
    rules = {"far": EMA(0.9), "near": EMA(0.9), "swa": SWA(update_interval="2ba")}
    averager = Averager(model, rules, device={"far": "cpu", "near": None, "swa": "cpu"})
    for step in range(5):
        with torch.no_grad():
            for name, weight in weights_at(model, step).items():
                model.state_dict()[name].copy_(weight)
        averager.step()
    near, far = averager.full_state_dict("near"), averager.full_state_dict("far")
    assert differences(near, far) == []
    assert differences(averager.full_state_dict("swa"), near) != []
    assert (averager["swa"].num_updates, averager["far"].num_updates) == (2, 5)


@pytest.mark.parametrize("buffers", ["live", "copied", "averaged"])
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_dtypes_strides_and_buffers(buffers: str, live: torch.dtype) -> None:
    def run(device: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(live)
        model = model.to(memory_format=torch.channels_last)
        averager = Averager(model, EMA(0.9), device=device, buffers=buffers)
        for _ in range(4):
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.add_(1)
            averager.step()
        with averager.applied():
            model(torch.randn(2, 3, 4, 4, dtype=live))
        averager.step()
        return averager.full_state_dict()

    assert differences(run("cpu"), run(None)) == []


def test_a_parameter_unfrozen_later_is_taken_up() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    averager = Averager(model, EMA(0.5), device="cpu")
    stepped(model, averager, 1.0)
    model[0].requires_grad_(True)
    stepped(model, averager, 2.0)
    stepped(model, averager, 4.0)
    found = averager.full_state_dict()
    assert found["0.weight"].unique().item() == 3.0  # (2 + 4) / 2
    assert found["1.weight"].unique().item() == 2.75  # ((1 + 2) / 2 + 4) / 2
    assert len({id(shard.tensor.untyped_storage()) for shard in averager["ema"].shards()}) > 1


def test_a_model_that_moves_is_followed() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, EMA(0.5), device="cpu")
    stepped(model, averager, 1.0)
    threes = {name: torch.full_like(each, 3.0) for name, each in model.state_dict().items()}
    model.load_state_dict(threes, assign=True)
    averager.step()
    assert averager.full_state_dict()["weight"].unique().item() == 2.0


def test_a_teacher_gets_it() -> None:
    model, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    averager = Averager(model, EMA(0.5), device="cpu")
    stepped(model, averager, 1.0)
    averager.copy_to(teacher)
    assert same(teacher.weight.detach(), torch.ones(2, 3))


def test_what_it_holds_and_takes() -> None:
    model = nn.Linear(300, 200)
    averager = Averager(model, EMA(), device="cpu")
    assert averager.metrics()["ema/bytes"] == 4 * (300 * 200 + 200)
    assert averager.metrics()["offload_waits"] == 0
    assert "offload_waits" not in Averager(model, EMA()).metrics()


def test_places_that_cannot_be() -> None:
    with pytest.raises(UnsupportedError, match=r"beside the parameters .None. or in host memory"):
        Averager(nn.Linear(1, 1), EMA(), device="meta")
    with pytest.raises(ConfigError, match=r"device names \['emma'\], the averages \['ema'\]"):
        Averager(nn.Linear(1, 1), EMA(), device={"emma": "cpu"})


def test_a_thread_ends_with_its_averager() -> None:
    def threads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith("distavg-offload")}

    before = threads()
    model = nn.Linear(2, 2)
    averager = Averager(model, EMA(), device="cpu")
    averager.step()
    model.to(torch.float64)
    averager.step()  # takes other memory, and another thread
    averager.synchronize()
    del averager
    gc.collect()
    for thread in threads() - before:
        thread.join(10)
        assert not thread.is_alive()
