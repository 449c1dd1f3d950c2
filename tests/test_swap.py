"""An average in place of the live weights, and back, without a trace, whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import (
    CASES,
    FEW,
    ONCE,
    cloned,
    differences,
    error_of,
    feed,
    model_class,
    outputs,
    outputs_with,
    same,
    storages,
    timed_error_of,
    torch_average,
    trained,
)
from models import (
    LAYOUTS,
    Awkward,
    TokenModel,
    Uneven,
    backward,
    build,
    local_part,
    loss,
    set_weights,
    unwrapped,
    weights_at,
)
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import distavg
from distavg import StateError, foreach, swap, wrappers

SHORT = timedelta(seconds=6)


class BodyError(Exception):
    """What the bodies here raise."""


def everything(model: nn.Module, refs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all that `applied` must leave as it was: storage, modes, RNG state."""
    modes = torch.tensor([module.training for module in model.modules()])
    return {**cloned(refs), "modes": modes, "rng": torch.get_rng_state()}


# ---------------------------------------------------------------- what the model computes


def wrong_outputs(layout: str) -> list[str]:
    """Where a model in evaluation does not compute what a plain one with those weights does."""
    model, averager = trained(layout, model_class(layout))
    model.eval()
    return [w for name in ("ema", "swa") for w in wrong_outputs_of(model, averager, layout, name)]


def wrong_outputs_of(
    model: nn.Module, averager: distavg.Averager, layout: str, name: str
) -> list[str]:
    cls = model_class(layout)
    live = outputs_with(cls, weights_at(model, 2), layout=layout)
    average = outputs_with(cls, torch_average(cls, name, range(3)), layout=layout)
    assert not same(live, average)
    seen = {"before": same(outputs(model), live)}  # from here on an FSDP2 root is unsharded
    with averager.applied(name):
        seen["inside"] = same(outputs(model), average)
        seen["inside again"] = same(outputs(model), average)
    seen["after"] = same(outputs(model), live)
    seen["after again"] = same(outputs(model), live)
    with averager.applied(name):
        seen["second time"] = same(outputs(model), average)
    seen["after second time"] = same(outputs(model), live)
    return [f"{name} {when}" for when, is_right in seen.items() if not is_right]


@pytest.mark.parametrize(("layout", "world_size"), CASES)
def test_forwards_see_the_average_inside_and_the_live_weights_outside(
    layout: str, world_size: int
) -> None:
    assert run_ranks(wrong_outputs, world_size, layout) == [[]] * world_size


def trace_of_a_body(layout: str) -> list[str]:
    model, averager = trained(layout, model_class(layout))
    refs = storages(model)
    backward(model)  # gradients, and buffers that differ between ranks
    with torch.no_grad():
        for buffer in unwrapped(model).buffers():
            buffer.add_(dist.get_rank()) if buffer.dtype != torch.bool else buffer.logical_not_()
    before = everything(model, refs)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    kept = {n: g.to_local() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    kept_before = cloned(kept)
    with averager.applied("ema"):
        model.eval()
        outputs(model)  # through DDP it overwrites other ranks' buffers by rank 0's
        model.train()
        outputs(model)  # moves BatchNorm statistics and counters
        next(iter(model.children())).eval()
        torch.rand(3)
        unwrapped(model).register_buffer("offset", torch.ones(TokenModel.vocabulary))
    # Not the same objects: FSDP1 makes new views of the same gradients at each forward.
    now = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    kept = {n: g.to_local() if isinstance(g, DTensor) else g for n, g in now.items()}
    return differences(everything(model, refs), before) + differences(kept, kept_before)


@pytest.mark.parametrize(("layout", "world_size"), ONCE)
def test_a_body_leaves_no_trace(layout: str, world_size: int) -> None:
    assert run_ranks(trace_of_a_body, world_size, layout) == [[]] * world_size


def update_while_unsharded(layout: str) -> list[str]:
    """Update after a forward, and write the sharded storage as an optimizer does."""
    cls = model_class(layout)
    model = build(layout, cls)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    averager = distavg.Averager(model, distavg.EMA(0.9))
    for step in range(3):
        set_weights(model, weights_at(model, step))
        outputs(model)
        averager.step()
    with torch.no_grad():
        for name, weight in weights_at(model, 3).items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):  # while modules hold unsharded parameters
                parameter.to_local().copy_(local_part(weight, parameter))
            else:
                parameter.copy_(weight)
    averager.step()
    found = averager.full_state_dict(all_ranks=True)
    expected = torch_average(cls, "ema", range(4))
    return differences({n: found[n] for n in parameters}, {n: expected[n] for n in parameters})


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2-keep"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_updates_read_the_sharded_storage(layout: str, world_size: int) -> None:
    assert run_ranks(update_while_unsharded, world_size, layout) == [[]] * world_size


def graphs_across_swaps(layout: str, is_guarded: bool) -> list[str]:
    """What backwards of graphs that span a swap raise: made before it, or inside.

    Without the guard, which is for activation checkpoints, autograd finds them alone.
    """
    with contextlib.ExitStack() as stack:
        if not is_guarded:
            stack.enter_context(mock.patch.object(wrappers, "_is_another", return_value=False))
        return backwards_across_swaps(layout)


def backwards_across_swaps(layout: str) -> list[str]:
    found = []
    model, averager = trained(layout, model_class(layout))
    value = loss(model)
    with averager.applied("ema"):
        found.append(error_of(value.backward))
    model, averager = trained(layout, model_class(layout))
    value = loss(model)
    with averager.applied("ema"):
        pass
    found.append(error_of(value.backward))
    model, averager = trained(layout, model_class(layout))
    with averager.applied("ema"):
        value = loss(model)
    found.append(error_of(value.backward))
    return found


@pytest.mark.parametrize(("layout", "world_size"), ONCE)
def test_autograd_notices_a_graph_that_spans_a_swap(layout: str, world_size: int) -> None:
    for texts in run_ranks(graphs_across_swaps, world_size, layout, False):
        for text in texts:
            assert re.search("modified (by an )?inplace", text), text


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2", "fsdp1-flat"])
def test_a_backward_on_the_other_side_of_a_swap_says_so(layout: str) -> None:
    for inside, after, from_inside in run_ranks(graphs_across_swaps, 2, layout, True):
        for text in (inside, from_inside):
            assert text.startswith("StateError: backward() on the other side of an applied()")
        assert re.search("modified (by an )?inplace", after), after


class Recomputed(nn.Module):
    """Layers whose activations are computed again in the backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
        wrapped = [checkpoint_wrapper(each) if how == "wrapper" else each for each in layers]
        self.layers = nn.ModuleList(wrapped)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.how == "wrapper":
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.how == "reentrant")
        return x


def recomputed_across_swaps(layout: str) -> list[list[str]]:
    return [backwards_of(layout, how) for how in ("wrapper", "reentrant", "not reentrant")]


def backwards_of(layout: str, how: str) -> list[str]:
    """What backwards raise: without a swap, across, inside, from inside, of weights replaced."""
    torch.manual_seed(0)
    model: Any = Recomputed(how)
    if layout == "ddp":
        model = DistributedDataParallel(model)
    elif layout == "fsdp2":
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    averager = distavg.Averager(model, distavg.EMA(0.5), replicas=dist.group.WORLD)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        averager.step()
    x = torch.ones(2, 6, requires_grad=True)

    def forward_and_backward() -> None:
        model(x).sum().backward()

    found = [error_of(forward_and_backward)]
    across = model(x).sum()
    with averager.applied():
        found.append(error_of(across.backward))
    with averager.applied():
        inside = model(x).sum()
        found.append(error_of(forward_and_backward))
    found.append(error_of(inside.backward))
    permanent = model(x).sum()
    averager.copy_to()
    return [*found, error_of(permanent.backward), error_of(forward_and_backward)]


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_recomputed_activations_are_not_those_of_other_weights(layout: str) -> None:
    for texts in itertools.chain(*run_ranks(recomputed_across_swaps, 2, layout)):
        across = "StateError: backward() on the other side of an applied()"
        is_right = [text.startswith(across) for text in texts]
        assert is_right == [False, True, False, True, True, False], texts
        assert [texts[i] for i in (0, 2, 5)] == ["nothing"] * 3


# ------------------------------------------------ what PyTorch derives from weights, and keeps


def test_weights_that_share_memory_come_back() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(4, 5))
    embedding, head = model[0].weight, model[1].weight
    head.data = embedding.data  # tied behind the names
    model[2].weight = nn.Parameter(embedding.data[2:7])
    averager = distavg.Averager(model, distavg.EMA(0.5))
    feed(averager, model, range(3))
    set_weights(model, weights_at(model, 7))
    live, average = embedding.detach().clone(), averager.full_state_dict()["0.weight"]
    with mock.patch.object(foreach, "_CPU_CHUNK_BYTES", 32):
        with averager.applied():
            assert same(embedding, average)
        assert same(embedding, live)
        with averager.applied():
            assert same(embedding, average)
        assert same(embedding, live)


@torch.no_grad()
def test_casts_that_autocast_keeps_are_of_the_present_weights() -> None:
    model = nn.Linear(4, 4)
    averager = distavg.Averager(model, distavg.EMA(0.5))
    feed(averager, model, range(3))
    x = torch.ones(2, 4)

    def output() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    with averager.applied():
        average = output()
    live = output()
    assert not same(average, live)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(model(x), live)
        with averager.applied():
            assert same(model(x), average)
        assert same(model(x), live)
        averager.copy_to()
        assert same(model(x), average)


@torch.no_grad()
def test_parametrizations_that_are_kept_are_of_the_present_weights() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    averager = distavg.Averager(model, distavg.EMA(0.5))
    for step in range(3):
        for index, parameter in enumerate(model.parameters()):
            parameter.fill_(step + index + 1)
        averager.step()
    x = torch.ones(2, 4)
    live = model(x)
    with averager.applied():
        average = model(x)
    assert not same(average, live)
    with parametrize.cached():
        assert same(model(x), live)
        with averager.applied():
            assert same(model(x), average)
        assert same(model(x), live)


def test_buffers_are_put_back_whatever_became_of_them() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("cache", torch.arange(4.0), persistent=False)
    model.register_buffer("table", torch.arange(5.0))
    buffers = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    averager = distavg.Averager(model, distavg.EMA(0.5))
    averager.step()
    with averager.applied():
        del model.cache
        model.cache = "something else"
        model.table.resize_(2)
        model.running_mean = None
    assert dict(model.named_buffers()) == buffers  # the very same
    assert differences(dict(model.named_buffers()), before) == []
    assert "cache" not in model.state_dict()
    assert model.cache is buffers["cache"]


def bf16_trace(layout: str) -> tuple[list[str], bool]:
    """bf16 weights under an fp32 average: what differs afterwards; whether the inside is right."""
    cls = model_class(layout)
    model = build(layout, cls, torch.bfloat16)
    averager = distavg.Averager(model, distavg.EMA(0.5))
    feed(averager, model, range(3))
    refs = storages(model)
    model.eval()
    before = everything(model, refs)
    average = averager.full_state_dict(all_ranks=True)
    assert {average[n].dtype for n in weights_at(model, 0)} == {torch.float32}
    with averager.applied():
        is_right = same(outputs(model), outputs_with(cls, average, torch.bfloat16, layout=layout))
    now = averager.full_state_dict(all_ranks=True)
    return differences(everything(model, refs), before) + differences(now, average), is_right


@pytest.mark.parametrize(("layout", "world_size"), FEW)
def test_a_fp32_average_of_bf16_weights_is_rounded_once_and_kept(
    layout: str, world_size: int
) -> None:
    assert run_ranks(bf16_trace, world_size, layout) == [([], True)] * world_size


def inference_mode_trace(layout: str) -> tuple[list[str], list[bool]]:
    cls = model_class(layout)
    model, averager = trained(layout, cls)
    refs = storages(model)
    model.eval()
    average = outputs_with(cls, torch_average(cls, "swa", range(3)), layout=layout)
    before = everything(model, refs)
    seen = []
    with torch.inference_mode(), averager.applied("swa"):
        seen.append(same(outputs(model), average))
    with averager.applied("swa"), torch.inference_mode():
        seen.append(same(outputs(model), average))
    averager.step()
    return differences(everything(model, refs), before), seen


@pytest.mark.parametrize(("layout", "world_size"), FEW)
def test_evaluation_in_inference_mode(layout: str, world_size: int) -> None:
    expected = ([], [True, True])
    assert run_ranks(inference_mode_trace, world_size, layout) == [expected] * world_size


# ---------------------------------------------------------------- bodies that fail


def fail_inside(layout: str, failing: list[int]) -> tuple[str, list[str], bool]:
    """What this rank raised, what changed, and whether the averager goes on well."""
    cls = model_class(layout)
    model, averager = trained(layout, cls)
    refs = storages(model)
    before = everything(model, refs)
    inner = unwrapped(model)

    def body() -> None:
        with averager.applied("swa"):
            model.train()
            outputs(model)
            inner.eval()
            torch.rand(1)
            if dist.get_rank() in failing:
                raise BodyError("the body's own")

    text = error_of(body)
    changed = differences(everything(model, refs), before)
    feed(averager, model, [3])
    found = averager.full_state_dict("swa", all_ranks=True)
    inner.eval()
    with averager.applied("swa"):
        is_well = same(outputs(model), outputs_with(cls, found, layout=layout))
    live = outputs_with(cls, weights_at(model, 3), layout=layout)
    return text, changed, is_well and same(outputs(model), live)


@pytest.mark.parametrize("failing", [[0, 1, 2], [1]], ids=["all", "one"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_body_that_raises_leaves_no_trace(layout: str, failing: list[int]) -> None:
    for rank, (text, changed, is_well) in enumerate(run_ranks(fail_inside, 3, layout, failing)):
        assert changed == []
        assert is_well
        if rank in failing:
            assert text == "BodyError: the body's own"
        else:
            assert text.startswith("RankError: applied('swa'): rank 1 raised an exception inside")


@contextmanager
def raising_in_forward(module: nn.Module) -> Iterator[None]:
    def hook(*_: object) -> None:
        raise BodyError("in the middle of a forward")

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def fail_in_forward(layout: str) -> list[tuple[str, list[str], bool, bool]]:
    """As above, from within the model's forward, while FSDP2 is in the middle of its own."""
    cls = model_class(layout)
    model, averager = trained(layout, cls)
    inner: Any = unwrapped(model)
    refs = storages(model)
    model.eval()
    live = outputs_with(cls, weights_at(model, 2), layout=layout)
    average = outputs_with(cls, torch_average(cls, "ema", range(3)), layout=layout)
    found = []
    for where in ("head", "norm"):
        if where == "norm" and layout.startswith("fsdp2"):
            inner.module.set_modules_to_forward_prefetch([inner.block])  # gathered, and never used
        before = everything(model, refs)

        def body(where: str = where) -> None:
            with averager.applied("ema"), raising_in_forward(inner.get_submodule(where)):
                outputs(model)

        text = error_of(body)
        changed = differences(everything(model, refs), before)
        is_right = same(outputs(model), live)
        with averager.applied("ema"):
            found.append((text, changed, is_right, same(outputs(model), average)))
    return found


@pytest.mark.parametrize(("layout", "world_size"), ONCE)
def test_a_forward_that_raises_leaves_no_stale_weights(layout: str, world_size: int) -> None:
    expected = [("BodyError: in the middle of a forward", [], True, True)] * 2
    assert run_ranks(fail_in_forward, world_size, layout) == [expected] * world_size


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupted_body_leaves_no_trace(error: type[BaseException]) -> None:
    model, averager = trained("plain", Awkward)
    refs = storages(model)
    before = everything(model, refs)
    with pytest.raises(error), averager.applied("ema"):
        raise error
    assert differences(everything(model, refs), before) == []
    averager.step()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BodyError])
def test_the_body_s_own_exception_goes_before_that_of_a_write(error: type[BaseException]) -> None:
    model, averager = trained("plain", Awkward)

    def body() -> None:
        with averager.applied("ema"), torch.no_grad():
            model.get_parameter("one").add_(1.0)
            raise error

    with pytest.raises(error):
        body()


def interrupted_on_one_rank() -> str:
    _, averager = trained("fsdp2", Uneven)
    try:
        with averager.applied("ema"):
            if dist.get_rank() == 1:
                raise KeyboardInterrupt
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_interrupt_on_one_rank_is_heard_of_on_the_others() -> None:
    first, second = run_ranks(interrupted_on_one_rank, 2)
    assert first.startswith("RankError: applied('ema'): rank 1 raised an exception inside")
    assert second.startswith("KeyboardInterrupt")


def die_while_entering() -> tuple[str, list[str], str] | None:
    _, averager = trained("ddp", Awkward, timeout=SHORT)
    own = [shard.tensor for shard in averager["ema"].live]
    before = [tensor.clone() for tensor in own]
    if dist.get_rank() == 1:
        with mock.patch.object(swap, "_share_pieces", side_effect=lambda *_: os._exit(1)):
            error_of(averager.applied("ema").__enter__)
    text = error_of(averager.applied("ema").__enter__)
    changed = [str(i) for i, (a, b) in enumerate(zip(own, before, strict=True)) if not same(a, b)]
    return text, changed, error_of(averager.step)


def test_a_rank_that_dies_while_entering_leaves_the_others_their_own_pieces() -> None:
    text, changed, step = run_ranks(die_while_entering, 2, expect_death=[1])[0]
    assert text.startswith("RankError: applied('ema'): lost contact")
    assert changed == []
    assert "live weights are not restored" in step


def write_inside(layout: str, writing: list[int], path: str) -> tuple[str, list[str], str, bool]:
    """What this rank raised, what changed, what `step` raises then, and whether a load mends it."""
    model, averager = trained(layout, model_class(layout))
    averager.save(path)
    saved = averager.full_state_dict("swa", all_ranks=True)
    refs = storages(model)
    before = everything(model, refs)

    def body() -> None:
        with averager.applied("swa"):
            outputs(model)
            if dist.get_rank() in writing:
                refs.get("module.weight", next(iter(refs.values())))[:1].add_(1.0)

    text = error_of(body)
    changed = differences(everything(model, refs), before)
    step = error_of(averager.step)
    averager.load(path)
    loaded = averager.full_state_dict("swa", all_ranks=True)
    averager.step()
    return text, changed, step, all(torch.equal(loaded[fqn], saved[fqn]) for fqn in saved)


@pytest.mark.parametrize("writing", [[0, 1], [1]], ids=["all", "one"])
@pytest.mark.parametrize(("layout", "world_size"), FEW)
def test_writing_to_weights_inside_is_found(
    layout: str, world_size: int, writing: list[int], tmp_path: Path
) -> None:
    found = run_ranks(write_inside, world_size, layout, writing, str(tmp_path / "before"))
    for rank, (text, changed, step, is_mended) in enumerate(found):
        assert changed == []
        assert is_mended
        if rank in writing:
            name = "experts" if layout.startswith("fsdp1") else "module.weight"
            assert text.startswith(f"StateError: {name} was written to inside applied('swa')")
            assert "what was written is now in the average: load a checkpoint" in text
            assert step == text
        else:
            for each, kind in ((text, "RankError"), (step, "StateError")):
                assert each.startswith(
                    f"{kind}: applied('swa'): rank {writing[0]} wrote to weights"
                )


def test_what_becomes_of_writes_that_do_not_reach_the_average() -> None:
    model, averager = trained("plain", Awkward, dtype=torch.bfloat16)
    with (
        pytest.raises(StateError, match="live weights are restored, and what was written is lost"),
        averager.applied("ema"),
        torch.no_grad(),
    ):
        model.module.weight.add_(1.0)
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    with (
        pytest.raises(StateError, match="It is not averaged, so it stays as it was written"),
        averager.applied("ema"),
        torch.no_grad(),
    ):
        frozen.add_(1.0)
    averager.step()


def test_the_hooks_error_of_a_step_inside_is_raised_and_the_damage_remembered() -> None:
    model, averager = trained("plain", Awkward)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager.attach(optimizer)
    backward(model, 0)
    with pytest.raises(StateError, match=r"^step\(\) inside applied"), averager.applied("ema"):
        optimizer.step()
    with pytest.raises(StateError, match="what was written is now in the average"):
        averager.step()


# ---------------------------------------------------------------- entering that fails


@contextmanager
def copies_that_fail(number: int, error: BaseException, *, after: bool) -> Iterator[list[int]]:
    """The copy of this number raises once, before or after it is made."""
    copy_ = torch._foreach_copy_
    calls: list[int] = []
    raised: list[int] = []

    def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
        calls.append(1)
        fails = len(calls) == number
        if not fails or after:
            copy_(targets, sources)
        if fails:
            raised.append(number)
            raise error

    # Small batches, so that there are many instants at which it can happen.
    with (
        mock.patch.object(torch, "_foreach_copy_", copy),
        mock.patch.object(foreach, "_CPU_CHUNK_BYTES", 32),
    ):
        yield raised


def fail_to_enter(layout: str, error: type[BaseException]) -> tuple[str, list[str], bool, bool]:
    cls = model_class(layout)
    model, averager = trained(layout, cls)
    refs = storages(model)
    before = everything(model, refs)
    entered = []

    def body() -> None:
        with averager.applied("ema"):
            entered.append(True)

    text = ""
    if dist.get_rank() == 1:
        with copies_that_fail(3, error("no memory left"), after=False):
            text = error_of(body)
    else:
        text = error_of(body)
    changed = differences(everything(model, refs), before)
    found = averager.full_state_dict("ema", all_ranks=True)
    expected = torch_average(cls, "ema", range(3))
    weights = weights_at(model, 0)
    is_kept = differences({n: found[n] for n in weights}, {n: expected[n] for n in weights}) == []
    model.eval()
    with averager.applied("ema"):
        is_well = same(outputs(model), outputs_with(cls, expected, layout=layout))
    return text, changed, is_kept and is_well, bool(entered)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entering_that_fails_halfway_on_one_rank_is_undone_on_all(layout: str) -> None:
    found = run_ranks(fail_to_enter, 3, layout, MemoryError)
    assert [rest for _, *rest in found] == [[[], True, False]] * 3
    assert found[1][0] == "MemoryError: no memory left"
    for text in (found[0][0], found[2][0]):
        assert text == "RankError: applied('ema') failed. rank 1: MemoryError: no memory left"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_interrupt_at_any_copy_of_a_swap_is_undone(
    dtype: torch.dtype | None, *, after: bool
) -> None:
    model, averager = trained("plain", Awkward, dtype=dtype)
    refs = storages(model)
    before = everything(model, refs)
    average = averager.full_state_dict("ema")
    number, interrupted = 0, True
    while interrupted:
        number += 1
        with copies_that_fail(number, KeyboardInterrupt(), after=after) as interrupts:
            try:
                with averager.applied("ema"):
                    pass
                interrupted = False
            except KeyboardInterrupt:
                interrupted = True
        assert interrupts == [number] * interrupted  # none is swallowed
        assert differences(everything(model, refs), before) == []
        assert differences(averager.full_state_dict("ema"), average) == []
    assert number > (3 if dtype else 30)


def enter_with_differing_replicas() -> tuple[str, list[str]]:
    model, averager = trained("ddp", Awkward)
    with torch.no_grad():
        if dist.get_rank() == 1:
            unwrapped(model).get_parameter("scalar").add_(1.0)
    refs = storages(model)
    before = everything(model, refs)

    def body() -> None:
        with averager.applied("ema"):
            raise BodyError("must not run")

    return error_of(body), differences(everything(model, refs), before)


def test_replicas_that_differ_are_found_before_they_are_overwritten() -> None:
    for text, changed in run_ranks(enter_with_differing_replicas, 3):
        assert text.startswith(
            "ReplicaMismatch: applied('ema'): scalar on ranks [1] differs from rank 0's"
        )
        assert changed == []


# ---------------------------------------------------------------- calls inside


def errors_inside(layout: str, folder: Path) -> tuple[dict[str, str], list[str], int]:
    model, averager = trained(layout, model_class(layout))
    refs = storages(model)
    before = everything(model, refs)
    averager.save(folder / "checkpoint")
    copied = averager.state_dict()
    steps = averager.step_count

    def nested(name: str) -> None:
        with averager.applied(name):
            raise BodyError("must not run")

    calls: dict[str, Callable[[], object]] = {
        "step()": averager.step,
        "update()": lambda: averager.update("ema"),
        "applied()": lambda: nested("swa"),
        "copy_to()": lambda: averager.copy_to(None, "swa"),
        "load()": lambda: averager.load(folder / "checkpoint"),
        "load_state_dict()": lambda: averager.load_state_dict(copied),
        "save(also=...)": lambda: averager.save(folder / "other", also=lambda path: None),
        "metrics(distance=True)": lambda: averager.metrics(distance=True),
    }
    with averager.applied("ema"):
        errors = {name: error_of(call) for name, call in calls.items()}
        errors["applied() again"] = error_of(nested, "ema")
    return errors, differences(everything(model, refs), before), averager.step_count - steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_would_mix_up_the_roles_is_an_error_inside(layout: str, tmp_path: Path) -> None:
    for errors, changed, steps in run_ranks(errors_inside, 2, layout, tmp_path):
        assert changed == []
        assert steps == 0
        for name, text in errors.items():
            call = name.removesuffix(" again")
            assert text.startswith(f"StateError: {call} inside applied('ema')"), name


def roles_inside(layout: str, folder: Path) -> list[str]:
    """What save, state_dict and the whole tensors, taken inside, hold that is not the average."""
    cls = model_class(layout)
    _, averager = trained(layout, cls)
    wrong = []
    expected = {name: torch_average(cls, name, range(3)) for name in averager.names}
    weights = weights_at(build("plain", cls), 0)
    with averager.applied("ema"):
        averager.save(folder / "inside")
        whole = {name: averager.full_state_dict(name, all_ranks=True) for name in averager.names}
        state = averager.state_dict()
        inside = {name: cloned(tensors_of(state, name)) for name in averager.names}
    outside = averager.state_dict()
    for name in averager.names:
        wrong += differences(inside[name], tensors_of(outside, name))
    _, other = trained(layout, cls, steps=[9])
    other.load(folder / "inside")
    for name, tensors in expected.items():
        for found in (whole[name], other.full_state_dict(name, all_ranks=True)):
            wrong += differences({n: found[n] for n in weights}, {n: tensors[n] for n in weights})
    return wrong


def tensors_of(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The plain tensors of an average's state on this rank."""
    plain: dict[str, Tensor] = {}
    for fqn, tensor in state["averages"][name]["tensors"].items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        pieces = local.local_shards() if hasattr(local, "local_shards") else [local]
        plain |= {f"{fqn} {index}": piece for index, piece in enumerate(pieces)}
    return plain


@pytest.mark.parametrize(("layout", "world_size"), FEW)
def test_save_and_state_dict_inside_give_true_roles(
    layout: str, world_size: int, tmp_path: Path
) -> None:
    assert run_ranks(roles_inside, world_size, layout, tmp_path) == [[]] * world_size


# ---------------------------------------------------------------- held buffers, early reads


def held_buffers(layout: str, buffers: str) -> tuple[bool, list[str], list[str]]:
    """BatchNorm with statistics of its own: right inside, and both kept after a training body."""
    cls = model_class(layout)
    model = build(layout, cls)
    averager = distavg.Averager(model, distavg.EMA(0.5), buffers=buffers)
    for step in range(2):
        set_weights(model, weights_at(model, step, buffers=True))
        averager.step()
    set_weights(model, weights_at(model, 5, buffers=True))
    refs = storages(model)
    before = everything(model, refs)
    average = averager.full_state_dict(all_ranks=True)
    with averager.applied():
        outputs(model)
        model.eval()
    with averager.applied():
        model.eval()
        is_right = same(outputs(model), outputs_with(cls, average, layout=layout))
    after = averager.full_state_dict(all_ranks=True)
    return is_right, differences(after, average), differences(everything(model, refs), before)


@pytest.mark.parametrize("buffers", ["copied", "averaged"])
@pytest.mark.parametrize(("layout", "world_size"), FEW)
def test_held_buffers_are_swapped_and_kept(layout: str, world_size: int, buffers: str) -> None:
    assert run_ranks(held_buffers, world_size, layout, buffers) == [(True, [], [])] * world_size


def test_before_the_first_update_nothing_is_swapped_and_one_warning_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Awkward()
    averager = distavg.Averager(model, distavg.EMA(0.9))
    before = everything(model, storages(model))
    versions = [p._version for p in model.parameters()]
    for _ in range(2):
        with averager.applied():
            assert differences(everything(model, storages(model)), before) == []
    assert [p._version for p in model.parameters()] == versions
    (record,) = caplog.records
    assert "average 'ema' has had no update yet" in record.getMessage()


# ---------------------------------------------------------------- ranks that are lost


def leave_with_the_lost(layout: str, how: str) -> tuple[str, float, list[str], str, str]:
    """Rank 1 goes missing inside `applied()`; what the others raise, what changed, what then."""
    model, averager = trained(layout, model_class(layout), timeout=SHORT)
    refs = storages(model)
    before = everything(model, refs)

    def body() -> None:
        with averager.applied("swa"):
            if dist.get_rank() == 1:
                if how == "dies":
                    os._exit(1)
                time.sleep(SHORT.total_seconds() + 3)
            elif how == "dies, and the body raises":
                raise BodyError("the body's own")

    text, seconds = timed_error_of(body)
    changed = differences(everything(model, refs), before)
    return text, seconds, changed, error_of(averager.step), error_of(averager.save, "/nonexistent")


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_the_others_end_soon_when_a_rank_dies_inside(layout: str) -> None:
    found = run_ranks(leave_with_the_lost, 3, layout, "dies", expect_death=[1])
    for rank in (0, 2):
        text, seconds, changed, step, save = found[rank]
        assert text.startswith("RankError: applied('swa'): lost contact with rank 1")
        assert seconds < SHORT.total_seconds() + 2
        if layout == "ddp":
            assert step.startswith("StateError: applied('swa') lost a rank before it could restore")
            assert "live weights are not restored" in step
            assert save == step
        else:  # nobody else has this rank's live weights: they are back
            assert changed == []
            assert step == "nothing"


def test_a_rank_that_never_comes_ends_the_wait_after_the_timeout() -> None:
    found = run_ranks(leave_with_the_lost, 2, "ddp", "sleeps")
    text, seconds, _, step, _ = found[0]
    assert text.startswith("RankError: applied('swa'): lost contact with rank 1")
    assert SHORT.total_seconds() / 2 < seconds < SHORT.total_seconds() + 2
    assert "live weights are not restored" in step


def raise_with_the_dead() -> tuple[str, str]:
    _, averager = trained("ddp", Awkward, timeout=SHORT)

    def body() -> None:
        with averager.applied("swa"):
            if dist.get_rank() == 1:
                os._exit(1)
            raise BodyError("the body's own")

    return error_of(body), error_of(averager.step)


def test_the_bodys_own_exception_goes_first_when_a_peer_is_lost() -> None:
    text, step = run_ranks(raise_with_the_dead, 2, expect_death=[1])[0]
    assert text == "BodyError: the body's own"
    assert "live weights are not restored" in step


def wait_for_the_dead(call: str, folder: Path) -> tuple[str, float]:
    _, averager = trained("fsdp2", Uneven, timeout=SHORT)
    if dist.get_rank() == 1:
        os._exit(1)

    def enter() -> None:
        with averager.applied("ema"):
            raise BodyError("must not run")

    calls: dict[str, Callable[[], object]] = {
        "save": lambda: averager.save(folder / "checkpoint"),
        "full_state_dict": lambda: averager.full_state_dict("ema"),
        "applied": enter,
    }
    return timed_error_of(calls[call])


@pytest.mark.parametrize("call", ["save", "full_state_dict", "applied"])
def test_nobody_waits_long_for_a_dead_rank(call: str, tmp_path: Path) -> None:
    found = run_ranks(wait_for_the_dead, 3, call, tmp_path, expect_death=[1])
    for rank in (0, 2):
        text, seconds = found[rank]
        assert text.startswith("RankError: ")
        assert "lost contact with rank 1" in text
        assert seconds < SHORT.total_seconds() + 2
    assert distavg.latest(tmp_path) is None


def test_the_seed_of_other_generators_is_not_ours() -> None:
    """Python's own generator is not PyTorch's: `applied` neither draws from it nor resets it."""
    _, averager = trained("plain", Awkward)
    state = random.getstate()
    with averager.applied("ema"):
        pass
    assert random.getstate() == state


def test_another_averager_of_the_same_model_keeps_out() -> None:
    model, averager = trained("plain", Awkward)
    other = distavg.Averager(model.get_submodule("down"), distavg.EMA(0.5))
    with averager.applied("ema"):
        for call in (other.step, other.full_state_dict, other.applied().__enter__):
            assert "are the average 'ema' of another Averager" in error_of(call)
    other.step()
    with other.applied():
        assert "are the average 'ema' of another Averager" in error_of(averager.step)
    averager.step()


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.cache: Tensor | None
        self.register_buffer("cache", None)

    def forward(self) -> Tensor:
        self.cache = self.weight.detach() * 2
        return self.cache


def test_a_buffer_that_was_empty_is_empty_again() -> None:
    model = Caching()
    averager = distavg.Averager(model, distavg.EMA(0.5))
    averager.step()
    with averager.applied():
        model()
    assert model.cache is None
    averager.step()
