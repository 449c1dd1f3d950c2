"""Pipeline stages, ties that a layout cuts, compiled models, adapters."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
from checks import RULES, differences, error_of, feed, same, torch_average, trained
from models import Uneven, build, mesh_of, set_weights, weights_at
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distavg import Averager, wrappers
from distavg.checkpoint.read import verify_checkpoint

# ---------------------------------------------------------------- pipeline stages


class Stage(nn.Module):
    """A part of a model of which each rank has another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(3, width)
        self.down = nn.Linear(width, 3, bias=False)
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.offset: Tensor
        self.register_buffer("offset", torch.full((width,), float(width)))


WIDTHS = (5, 2, 7, 3)  # of the stages s0 to s3


def stages(wrapped_in: str) -> dict[str, nn.Module]:
    """The stages of this rank: plain ones in turn, others on half of the ranks, as replicas."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if wrapped_in == "plain":
        return {f"s{n}": Stage(WIDTHS[n]) for n in range(4) if n % size == rank}
    halves = [list(range(size // 2)), list(range(size // 2, size))]
    groups = [dist.new_group(half) for half in halves]  # made by all ranks
    half = int(rank >= size // 2)
    mesh = mesh_of("hsdp")["shard"]  # these halves
    return {
        f"s{n}": DistributedDataParallel(Stage(WIDTHS[n]), process_group=groups[half])
        if wrapped_in == "ddp"
        else fully_shard(Stage(WIDTHS[n]), mesh=mesh)
        for n in (2 * half, 2 * half + 1)
    }


def whole_model() -> dict[str, nn.Module]:
    return {f"s{number}": Stage(width) for number, width in enumerate(WIDTHS)}


def weights_of_all(step: int) -> dict[str, Tensor]:
    shapes = {
        f"{prefix}.{name}": tuple(p.shape)
        for prefix, module in whole_model().items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    return weights_at(shapes, step)


def train_stages(model: dict[str, nn.Module], averager: Averager, steps: range) -> None:
    for step in steps:
        weights = weights_of_all(step)
        for prefix, module in model.items():
            mine = {
                n.removeprefix(f"{prefix}."): w for n, w in weights.items() if n.startswith(prefix)
            }
            set_weights(module, mine)
        averager.step()


def oracle(rule: str, steps: range) -> dict[str, Tensor]:
    average: dict[str, Tensor] = {}
    for n, step in enumerate(steps):
        for name, weight in weights_of_all(step).items():
            if n == 0:
                average[name] = weight.clone()
            else:
                average[name].lerp_(weight, 1 - 0.9 if rule == "ema" else 1 / (n + 1))
    return average


def pipeline(wrapped_in: str, root: Path) -> tuple[list[str], int, str]:
    model = stages(wrapped_in)
    averager = Averager(model, RULES)
    train_stages(model, averager, range(3))
    wrong = []
    for rule in RULES:
        expected = oracle(rule, range(3))
        found = averager.full_state_dict(rule, all_ranks=True)
        wrong += differences({n: found[n] for n in expected}, expected)
        wrong += [
            f"s{n}.offset" for n, w in enumerate(WIDTHS) if found[f"s{n}.offset"].sum() != w * w
        ]
        wrong += [f"s{n}.frozen" for n, w in enumerate(WIDTHS) if found[f"s{n}.frozen"].sum() != w]
    with averager.applied("ema"):
        averager.save(root / wrapped_in)
    again = Averager(model, RULES)
    again.load(root / wrapped_in)
    train_stages(model, averager, range(3, 5))
    train_stages(model, again, range(3, 5))
    for rule in RULES:
        expected = oracle(rule, range(5))
        for each in (averager, again):
            found = each.full_state_dict(rule, all_ranks=True)
            wrong += differences({n: found[n] for n in expected}, expected)
    held = sum(shard.tensor.numel() for shard in averager["ema"].shards())
    return wrong, held, str(averager.names)


@pytest.mark.parametrize(
    ("wrapped_in", "world_size"), [("plain", 2), ("plain", 3), ("fsdp2", 4), ("ddp", 4)]
)
def test_pipeline_stages_are_one_model(wrapped_in: str, world_size: int, tmp_path: Path) -> None:
    results = run_ranks(pipeline, world_size, wrapped_in, tmp_path)
    assert [wrong for wrong, *_ in results] == [[]] * world_size
    total = sum(tensor.numel() for tensor in weights_of_all(0).values())
    assert sum(held for _, held, _ in results) == total
    assert verify_checkpoint(tmp_path / wrapped_in)[1] == []
    model = whole_model()  # one process loads what the stages saved
    averager = Averager(model, RULES)
    averager.load(tmp_path / wrapped_in)
    for rule in RULES:
        found = averager.full_state_dict(rule)
        expected = oracle(rule, range(3))
        assert differences({n: found[n] for n in expected}, expected) == []


# ---------------------------------------------------------------- ties


def untied(averager: Averager) -> dict[str, Tensor]:
    whole = averager.full_state_dict("ema", all_ranks=True)
    return {name: whole[name] for name in ("embed.weight", "head.weight")}


class Untied(Uneven):
    """The same with two tensors in place of a tied one, as tensor parallelism leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.empty(self.vocabulary, 4))
        self.reset()


def ties(root: Path) -> tuple[list[str], list[str], str]:
    _, tied = trained("fsdp2", Uneven)
    tied.save(root / "tied")
    model, apart = trained("fsdp2", Untied, ())
    apart.load(root / "tied")
    wrong = differences(untied(apart), untied(tied))
    apart.save(root / "apart")
    _, again = trained("ddp", Uneven, ())
    again.load(root / "apart")
    back = differences(untied(again), untied(tied))
    feed(apart, model, [5])
    apart.save(root / "differing")
    before = untied(again)
    text = error_of(again.load, root / "differing")
    back += differences(untied(again), before)
    again.step()  # nothing was changed, and it goes on
    return wrong, back, text


def test_ties_that_a_layout_cuts_load_either_way(tmp_path: Path) -> None:
    for wrong, back, text in run_ranks(ties, 2, tmp_path):
        assert wrong == []
        assert back == []
        assert "embed.weight and head.weight are one tensor here, and differ" in text


# ---------------------------------------------------------------- compile


def compiled(how: str) -> tuple[list[str], list[tuple[int, int]], list[str]]:
    """What is wrong; frames and graph breaks that are added; backwards across swaps."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    if how == "compile, then wrap":
        inner = build("plain", Uneven)
        model: Any = DistributedDataParallel(torch.compile(inner, backend="aot_eager"))
    else:
        wrapped = build(how.split()[0], Uneven)
        model = torch.compile(wrapped, backend="aot_eager")
    averager = Averager(model, RULES)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    averager.attach(optimizer)

    def one_step(step: int) -> None:
        set_weights(model, weights_at(build("plain", Uneven), step))
        model(torch.arange(5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def work() -> tuple[int, int]:
        return int(counters["frames"]["total"]), sum(counters["graph_break"].values())

    for step in range(2):
        one_step(step)
    counted = [work()]
    one_step(2)
    counted.append(work())
    wrong = []
    for rule in RULES:
        found = averager.full_state_dict(rule, all_ranks=True)
        expected = torch_average(Uneven, rule, range(3))
        names = [n for n, p in build("plain", Uneven).named_parameters()]
        wrong += differences({n: found[n] for n in names}, {n: expected[n] for n in names})
    model.eval()
    with torch.no_grad():
        live = model(torch.arange(5)).clone()
        counted.append(work())
        with averager.applied("ema"):
            inside = model(torch.arange(5)).clone()
        again = model(torch.arange(5)).clone()
    wrong += [] if same(live, again) and not same(live, inside) else ["forwards"]
    counted.append(work())
    assert counted[0][0] > 0  # the compiler counts
    assert counted[2] > counted[1]  # evaluation mode was compiled
    added = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(counted)]
    model.train()
    across = model(torch.arange(5)).sum()
    with averager.applied("ema"):
        inside = model(torch.arange(5)).sum()
    # Once a backward has raised, FSDP1 can run no forward any more.
    spanning = [error_of(inside.backward)]
    with mock.patch.object(wrappers, "_is_another", return_value=False):  # autograd alone
        spanning += [error_of(across.backward), error_of(inside.backward)]
    return wrong, [added[0], added[2]], spanning


@pytest.mark.parametrize(
    "how", ["compile, then wrap", "ddp compiled", "fsdp2 compiled", "fsdp1 compiled"]
)
def test_compiled_models_are_not_compiled_again(how: str) -> None:
    for wrong, added, spanning in run_ranks(compiled, 2, how, timeout=110):
        assert wrong == []
        assert added == [(0, 0), (0, 0)]
        assert "backward() on the other side of an applied()" in spanning[0]
        assert all("modified by an inplace operation" in text for text in spanning[1:]), spanning


# ---------------------------------------------------------------- adapters


def adapted(layout: str, root: Path) -> tuple[list[str], list[str], int, int]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    if layout == "ddp":
        model = DistributedDataParallel(model)
    elif layout == "fsdp2":
        fully_shard(model, mesh=mesh_of("fsdp2"))
    averager = Averager(model, RULES)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
    averager.attach(optimizer)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with averager.applied("ema"):
        averager.save(root / layout)
    shapes = sum(p.numel() for p in trainable.values())
    held = [shard.fqn for shard in averager["ema"].shards() if "lora_" not in shard.fqn]
    before = averager.full_state_dict("ema", all_ranks=True)
    averager.update("ema")
    averager.load(root / layout)
    wrong = differences(averager.full_state_dict("ema", all_ranks=True), before)
    return wrong, held, averager["ema"].nbytes // 4, shapes


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_of_a_peft_model_only_the_adapters_are_held_and_saved(layout: str, tmp_path: Path) -> None:
    results = run_ranks(adapted, 2, layout, tmp_path)
    for wrong, others, _, _ in results:
        assert wrong == []
        assert others == []
    assert sum(held for _, _, held, _ in results) == results[0][3]
