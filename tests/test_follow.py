"""What changes under an averager's feet: it follows or says what happened, and nothing is stale."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import RULES, cloned, differences, error_of, feed, same, torch_average, trained
from models import Awkward, Uneven, build, reshard, set_weights, unwrapped, weights_at
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from distavg import EMA, SWA, Averager


def frozen_names(model: nn.Module) -> list[str]:
    return [n for n, p in unwrapped(model).named_parameters() if not p.requires_grad]


def expected_after_thaw(layout: str, name: str, thawed_at: int, steps: int) -> Tensor:
    """The average of one parameter that is copied at a step and averaged from then on."""
    shape = build("plain", Uneven).get_parameter(name).shape
    weights = [weights_at({name: shape}, step)[name] for step in range(steps)]
    average = weights[thawed_at].clone()
    for step in range(thawed_at + 1, steps):
        average.lerp_(weights[step], 1 - 0.9 if layout == "ema" else 1 / (step + 1))
    return average


def thaw(layout: str) -> tuple[list[str], int, int, int]:
    """What differs after a parameter was unfrozen; collectives of that step; elements held."""
    model, averager = trained(layout, Uneven, range(2))
    unwrapped(model).get_parameter("frozen").requires_grad_(True)
    set_weights(model, weights_at(model, 2))
    with CommDebugMode() as seen:
        averager.step()
    feed(averager, model, [3])
    wrong = []
    for rule in RULES:
        found = averager.full_state_dict(rule, all_ranks=True)
        expected = torch_average(Uneven, rule, range(4))
        expected["frozen"] = expected_after_thaw(rule, "frozen", 2, 4)
        wrong += differences(
            {n: found[n] for n in RULE_NAMES}, {n: expected[n] for n in RULE_NAMES}
        )
    with averager.applied("ema"):
        pass
    held = sum(shard.tensor.numel() for shard in averager["ema"].shards())
    total = sum(p.numel() for p in unwrapped(model).parameters())
    return wrong, seen.get_total_counts(), held, total


RULE_NAMES = [name for name, _ in Uneven().named_parameters()]


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2", "fsdp2-keep"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_parameter_that_is_unfrozen_later_starts_with_a_copy(
    layout: str, world_size: int
) -> None:
    results = run_ranks(thaw, world_size, layout)
    assert [wrong for wrong, *_ in results] == [[]] * world_size
    assert all(collectives == 0 for _, collectives, _, _ in results)
    if layout != "plain":  # nothing is held twice
        assert sum(held for _, _, held, _ in results) == results[0][3]


def thaw_and_save(path: Path) -> tuple[list[str], str]:
    model, averager = trained("ddp", Uneven, range(2))
    averager.save(path / "before")
    unwrapped(model).get_parameter("frozen").requires_grad_(True)
    averager.save(path / "after")  # found here, without a step in between
    other, again = trained("fsdp2", Uneven, ())
    refused = error_of(again.load, path / "after")
    other.get_parameter("frozen").requires_grad_(True)
    again.load(path / "after")
    first = averager.full_state_dict("ema", all_ranks=True)
    return differences(again.full_state_dict("ema", all_ranks=True), first), refused


def test_an_unfrozen_parameter_is_saved_and_loaded(tmp_path: Path) -> None:
    for wrong, refused in run_ranks(thaw_and_save, 2, tmp_path):
        assert wrong == []
        assert "frozen is in the checkpoint and not averaged here" in refused


def freeze_later(layout: str) -> list[str]:
    model, averager = trained(layout, Uneven, range(2))
    weights = weights_at(model, 2)
    for parameter in unwrapped(model).parameters():
        parameter.requires_grad_(False)
    reshard(model)
    set_weights(model, weights)
    averager.step()
    wrong: list[str] = []
    for rule in RULES:
        found = averager.full_state_dict(rule, all_ranks=True)
        expected = torch_average(Uneven, rule, range(3))
        wrong += differences({n: found[n] for n in weights}, {n: expected[n] for n in weights})
    return wrong


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_parameter_that_is_frozen_later_goes_on_being_averaged(layout: str) -> None:
    assert run_ranks(freeze_later, 2, layout) == [[], []]


def convert(model: nn.Module) -> None:
    model.to(torch.float64)


def assign(model: nn.Module) -> None:
    state = cloned(model.state_dict())
    model.load_state_dict(state, assign=True)
    inner = unwrapped(model)
    assert isinstance(inner, Uneven)
    inner.head.weight = inner.embed.weight  # assign unties
    for parameter, frozen in ((p, n in FROZEN) for n, p in unwrapped(model).named_parameters()):
        parameter.requires_grad_(not frozen)


FROZEN = frozen_names(Uneven())


def replace_one(model: nn.Module) -> None:
    inner = unwrapped(model)
    old = inner.get_parameter("one")
    assert isinstance(inner, Uneven)
    inner.one = nn.Parameter(old.detach().clone())


CHANGES = {"converted": convert, "assigned": assign, "replaced": replace_one}


def change_and_go_on(layout: str, change: str) -> tuple[list[str], list[str], bool]:
    """What differs from an average of the same weights, and what a swap leaves behind."""
    model, averager = trained(layout, Uneven, range(2))
    reshard(model)
    CHANGES[change](model)
    dtype = unwrapped(model).get_parameter("one").dtype
    for step in (2, 3):
        set_weights(model, {n: w.to(dtype) for n, w in weights_at(Uneven(), step).items()})
        averager.step()
    assert set(averager["ema"].dtypes.values()) == {torch.float32}
    live = cloned({n: local(p) for n, p in unwrapped(model).named_parameters()})
    wrong = []
    for rule in RULES:
        found = averager.full_state_dict(rule, all_ranks=True)
        expected = torch_average(Uneven, rule, range(4))
        wrong += differences({n: found[n] for n in live}, {n: expected[n] for n in live})
    with averager.applied("ema"):
        inside = {n: local(p) for n, p in unwrapped(model).named_parameters()}
        has_moved = not same(inside["one"], live["one"]) or not live["one"].numel()
    reshard(model)
    after = {n: local(p) for n, p in unwrapped(model).named_parameters()}
    return sorted(set(wrong)), differences(after, live), has_moved


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


@pytest.mark.parametrize(
    ("layout", "world_size", "change"),
    [
        (layout, world_size, change)
        for layout, world_size in (("plain", 1), ("ddp", 2), ("fsdp2", 2))
        for change in CHANGES
        if (layout, change) != ("fsdp2", "replaced")  # FSDP2 goes on with the one that it had
    ],
)
def test_storage_and_dtypes_that_change_are_followed(
    layout: str, world_size: int, change: str
) -> None:
    for wrong, left, has_moved in run_ranks(change_and_go_on, world_size, layout, change):
        assert wrong == [
            n for n in FROZEN if change == "converted"
        ]  # live ones are read as they are
        assert left == []
        assert has_moved


def move_inside(layout: str) -> tuple[str, str]:
    model, averager = trained(layout, Awkward)

    def body() -> None:
        with averager.applied("ema"):
            model.double()
            model.float()

    return error_of(body), error_of(averager.step)


@pytest.mark.parametrize(("layout", "world_size"), [("plain", 1), ("ddp", 2)])
def test_weights_that_move_inside_applied_cannot_be_put_back(layout: str, world_size: int) -> None:
    for text, step in run_ranks(move_inside, world_size, layout):
        assert "moved to other storage inside applied('ema')" in text
        assert "cannot be put back" in step


def test_a_parameter_that_is_unfrozen_inside_applied_is_taken_up_afterwards() -> None:
    model, averager = trained("plain", Uneven)
    with averager.applied("ema"):
        model.get_parameter("frozen").requires_grad_(True)
        averager.full_state_dict("ema")
    assert "frozen" not in averager["ema"].dtypes
    averager.step()
    assert "frozen" in averager["ema"].dtypes


def test_a_frozen_parameter_that_is_replaced_and_then_unfrozen_is_found() -> None:
    model = build("plain", Uneven)
    assert isinstance(model, Uneven)
    averager = Averager(model, EMA())
    model.frozen = nn.Parameter(torch.zeros(7, 1), requires_grad=False)
    averager.step()
    model.frozen.requires_grad_(True)
    averager.step()
    assert "frozen" in averager["ema"].dtypes


def test_states_and_metrics_are_of_the_weights_as_they_are_now() -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, EMA())
    model.load_state_dict(
        {n: torch.full_like(p, 7.0) for n, p in model.named_parameters()}, assign=True
    )
    assert averager.state_dict()["averages"]["ema"]["tensors"]["weight"].unique().tolist() == [7.0]
    averager.step()
    model.load_state_dict(
        {n: torch.full_like(p, 9.0) for n, p in model.named_parameters()}, assign=True
    )
    assert averager.metrics(distance=True)["ema/distance"] == pytest.approx(2 * 6**0.5)


def unfreeze_on_one_rank() -> tuple[str, str]:
    model, averager = trained("fsdp2", Uneven)
    if dist.get_rank() == 1:
        model.get_parameter("frozen").requires_grad_(True)
    return error_of(averager.applied("ema").__enter__), error_of(averager.full_state_dict, "ema")


def test_a_parameter_that_is_unfrozen_on_one_rank_only_is_an_error_on_all() -> None:
    for texts in run_ranks(unfreeze_on_one_rank, 2):
        for text in texts:
            assert text.startswith("ConfigError: frozen is not the same on all ranks")


def test_an_update_that_ran_out_of_memory_while_following_is_repeated() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    averager = Averager(model, {"x": EMA(), "y": EMA()})
    averager.step()
    model[1].requires_grad_(True)
    with mock.patch("torch.empty_like", side_effect=MemoryError("full")):
        assert error_of(averager.step) == "MemoryError: full"
    averager.step()
    for name in averager.names:
        assert {shard.fqn for shard in averager[name].shards()} == set(model.state_dict())


def test_the_old_storage_is_let_go() -> None:
    model = nn.Linear(64, 64)
    averager = Averager(model, EMA())
    averager.step()
    old = model.weight.data_ptr()
    model.weight = nn.Parameter(torch.zeros(64, 64))
    averager.step()
    gc.collect()
    kinds = (Tensor, nn.Parameter)
    tensors = [each for each in gc.get_objects() if type(each) in kinds]
    held = [t for t in tensors if t.layout == torch.strided and t.data_ptr() == old]
    assert held == []


def removed(what: str) -> str:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    averager = Averager(model, SWA(update_interval="1ba"))
    averager.step()
    if what == "removed":
        del model[1].weight
    else:
        model[0].extra = nn.Parameter(torch.zeros(1))
    calls: dict[str, Any] = {"removed": averager.step, "added": averager.applied().__enter__}
    return error_of(calls[what])


def test_tensors_that_come_or_go_are_named() -> None:
    assert removed("removed").startswith("ModelMismatch: 1.weight was removed from the model")
    model = build("plain", Awkward)
    averager = Averager(model, EMA())
    assert isinstance(model, Awkward)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    text = error_of(averager.applied().__enter__)
    assert text.startswith("ModelMismatch: head.weight was untied from embed.weight in the model")
    assert removed("added").startswith("ModelMismatch: 0.extra was added to the model")


# ---------------------------------------------------------------- the tree of modules


def replaced_head(layout: str) -> tuple[list[str], str]:
    """A layer is exchanged for another of the same shapes; then one is added."""
    torch.manual_seed(0)
    head, more = nn.Linear(3, 3), nn.Linear(3, 3)
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if layout == "ddp":
        model = DistributedDataParallel(model)
    elif layout == "fsdp2":
        for each in (*model, head, more):
            fully_shard(each)
        fully_shard(model)
    averager = Averager(model, EMA(0.5))
    feed(averager, model, range(2))
    unwrapped(model)[1] = head
    expected = averager.full_state_dict(all_ranks=True)
    for step in range(2, 5):
        weights = weights_at(model, step)
        set_weights(model, weights)
        averager.step()
        for name, weight in weights.items():
            expected[name].lerp_(weight, 0.5)
    wrong = differences(averager.full_state_dict(all_ranks=True), expected)
    unwrapped(model).append(more)
    return wrong, error_of(averager.step)


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_a_module_that_is_replaced_or_added_is_noticed_at_the_next_step(layout: str) -> None:
    for wrong, text in run_ranks(replaced_head, 1 if layout == "plain" else 2, layout):
        assert wrong == []
        assert text.startswith("ModelMismatch: 2.bias was added to the model")


def test_a_parameter_that_becomes_none_is_named() -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, EMA())
    model.bias = None
    assert error_of(averager.step).startswith("ModelMismatch: bias was removed from the model")


def test_a_live_buffer_may_change_its_shape() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("cache", torch.zeros(3))
    averager = Averager(model, EMA())
    averager.step()
    model.cache = torch.ones(5)
    with averager.applied():
        pass
    assert same(averager.full_state_dict()["cache"], torch.ones(5))


def test_weights_that_are_transposed_in_place_are_followed() -> None:
    model = nn.Linear(3, 3, bias=False)
    averager = Averager(model, EMA(0.5))
    averager.step()
    model.weight.data = model.weight.data.t()
    with averager.applied():  # looks at everything
        pass
    before = averager.full_state_dict()["weight"]
    averager.step()
    assert same(averager.full_state_dict()["weight"], before.lerp(model.weight.detach(), 0.5))


# ---------------------------------------------------------------- inference mode


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_that_is_taken_in_inference_mode_is_for_training(dtype: torch.dtype | None) -> None:
    model = build("plain", Uneven)
    with torch.inference_mode():
        averager = Averager(model, EMA(0.5))
    feed(averager, model, range(2))
    model.get_parameter("frozen").requires_grad_(True)
    if dtype is not None:
        model.to(dtype)
    with torch.inference_mode(), averager.applied():
        pass
    feed(averager, model, range(2, 4))
    assert averager["ema"].num_updates == 4


# ---------------------------------------------------------------- what cannot be averaged


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_tensors_that_are_not_understood_are_named() -> None:
    lazy = nn.LazyLinear(3)
    assert "weight of a lazy module has no shape yet" in error_of(Averager, lazy, EMA())
    model = nn.Linear(2, 2)
    model.register_buffer("rows", torch.eye(2))
    averager = Averager(model, EMA())
    model.rows = model.rows.to_sparse()
    assert "rows is a sparse or quantized tensor" in error_of(averager.full_state_dict)
    assert "rows is a sparse or quantized tensor" in error_of(Averager, model, EMA())
    model.register_buffer("rows", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    assert "rows is a sparse or quantized tensor" in error_of(Averager, model, EMA())
    model.register_buffer("rows", None)
    model.weight = nn.Parameter(torch.ones(1, 2).expand(2, 2))
    assert "weight is an expanded tensor" in error_of(Averager, model, EMA())
    assert error_of(Averager, model, EMA(), exclude=["weight"]) == "nothing"
