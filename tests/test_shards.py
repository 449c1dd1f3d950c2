"""Every kind of wrapper as a list of shards: each element on exactly one rank, as a view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import CASES, RULES, differences, error_of, model_class, same, storages
from models import LAYOUTS, Awkward, Uneven, backward, build, set_weights, weights_at
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn.parallel import DistributedDataParallel

from distavg import Averager, ConfigError, ModelMismatch, UnsupportedError
from distavg.comm import Comm
from distavg.shards import ModelShards

TRAINABLE = {
    cls: {n: p.numel() for n, p in build("plain", cls).named_parameters() if p.requires_grad}
    for cls in (Awkward, Uneven)
}
# No cut falls inside a row (the last dim) of a tensor, nor inside an element.
LARGEST_CUT = dict.fromkeys((Awkward, Uneven), 7)

Boxes = list[tuple[str, tuple[slice, ...]]]


def owned_boxes(layout: str) -> tuple[Boxes, list[str], bool]:
    """What this rank owns, what of it reads otherwise, and if it owns that after a forward too."""
    cls = model_class(layout)
    model = build(layout, cls)
    weights = weights_at(model, 7)
    set_weights(model, weights)
    replicas = dist.group.WORLD if layout in ("plain", "tp") else None
    found: list[Boxes] = []
    wrong: list[str] = []
    for _ in range(2):
        owned = ModelShards(model, Comm(), replicas=replicas).owned
        found.append([(shard.fqn, shard.box.slices()) for shard in owned])
        wrong += [s.fqn for s in owned if not same(s.tensor, weights[s.fqn][s.box.slices()])]
        with torch.no_grad():
            model(torch.tensor([1, 2]))  # an FSDP2 root has unsharded parameters now
    return found[0], wrong, found[0] == found[1]


@pytest.mark.parametrize(("layout", "world_size"), CASES)
def test_each_trainable_element_is_on_exactly_one_rank(layout: str, world_size: int) -> None:
    cls = model_class(layout)
    plain = weights_at(build("plain", cls), 0)
    counts = {name: torch.zeros(weight.shape, dtype=torch.int64) for name, weight in plain.items()}
    for boxes, wrong, is_the_same_after_a_forward in run_ranks(owned_boxes, world_size, layout):
        assert wrong == []
        assert is_the_same_after_a_forward
        for fqn, box in boxes:
            counts[fqn][box] += 1
    assert {n: c.unique().tolist() for n, c in counts.items()} == {name: [1] for name in counts}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_replicas_divide_evenly(world_size: int) -> None:
    total = sum(TRAINABLE[Awkward].values())
    held = [sum(owned_elements(boxes)) for boxes, *_ in run_ranks(owned_boxes, world_size, "ddp")]
    assert sum(held) == total
    assert max(held) <= total / world_size + LARGEST_CUT[Awkward]


def owned_elements(boxes: Boxes) -> list[int]:
    shapes = {name: p.shape for name, p in build("plain", Awkward).named_parameters()}
    return [torch.empty(shapes[fqn])[box].numel() for fqn, box in boxes]


def writes_reach_the_model(layout: str) -> list[str]:
    """The parameters that this rank's shards do not share memory with."""
    model = build(layout, model_class(layout))
    refs = storages(model)
    shards = ModelShards(model, Comm())
    for shard in shards.owned:
        shard.tensor.fill_(1234.0)
    names = {shard.fqn for shard in shards.owned}
    return [name for name in names if not (refs[name] == 1234.0).any()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_views_of_the_live_storage(layout: str) -> None:
    assert run_ranks(writes_reach_the_model, 2, layout) == [[], []]


# ------------------------------------------------------------------------------ names


def names_under(wrappers: str) -> list[str]:
    """The names of Awkward under some wrappers, outermost last."""
    model: nn.Module = Awkward()
    for wrapper in wrappers.split():
        if wrapper == "ddp":
            model = DistributedDataParallel(model)
        elif wrapper == "compile":
            model = torch.compile(model, backend="eager")  # type: ignore[assignment]
        else:
            holder = nn.Module()
            holder.module = model
            model = holder
    return [tensor.fqn for tensor in ModelShards(model, Comm()).tensors]


@pytest.mark.parametrize("wrappers", ["ddp", "compile", "ddp compile", "compile ddp"])
def test_wrappers_leave_no_trace_in_names(wrappers: str) -> None:
    plain = [t.fqn for t in ModelShards(Awkward(), Comm()).tensors]
    assert "module.weight" in plain  # a real child of that name
    assert run_ranks(names_under, 1, wrappers) == [plain]


@pytest.mark.parametrize("wrappers", ["child", "ddp child", "child ddp", "child compile ddp"])
def test_a_real_child_called_module_keeps_its_name(wrappers: str) -> None:
    plain = [t.fqn for t in ModelShards(Awkward(), Comm()).tensors]
    assert run_ranks(names_under, 1, wrappers) == [[f"module.{name}" for name in plain]]


def test_a_mapping_of_stages_prefixes_names() -> None:
    stages = {"first": nn.Linear(2, 2, bias=False), "second": nn.Linear(2, 1, bias=False)}
    shards = ModelShards(stages, Comm())
    assert [t.fqn for t in shards.tensors] == ["first.weight", "second.weight"]


# ------------------------------------------------------------------------------ what is held


def held(model: nn.Module, **options: Any) -> set[str]:
    shards = ModelShards(model, Comm(), **options)
    return {tensor.fqn for tensor in shards.tensors if tensor.is_held}


def test_frozen_parameters_and_live_buffers_are_not_held() -> None:
    assert held(Awkward()) == set(TRAINABLE[Awkward])
    assert "frozen" not in TRAINABLE[Awkward]


def test_buffers_are_held_on_request() -> None:
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    buffers |= {"offset", "calls", "mask"}
    assert held(Awkward(), hold_buffers=True) - held(Awkward()) == buffers


def test_buffers_that_are_not_persistent_are_never_held() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    assert held(model, hold_buffers=True) == {"weight", "bias"}


def test_include_and_exclude_are_patterns_of_canonical_names() -> None:
    assert held(Awkward(), include=["module.*"]) == {"module.weight", "module.bias"}
    assert held(Awkward(), include=["module.*", "one"], exclude=["*.bias"]) == {
        "module.weight",
        "one",
    }
    assert "embed.weight" not in held(Awkward(), exclude=["head.weight"])  # tied: either name


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"exclude: 'headd\.\*' matches no parameter or buffer"):
        held(Awkward(), exclude=["headd.*"])
    with pytest.raises(ConfigError, match="give a list of patterns, not a string"):
        held(Awkward(), include="module.*")


def test_tied_parameters_are_one_tensor() -> None:
    tensors = {t.fqn: t for t in ModelShards(Awkward(), Comm()).tensors}
    assert tensors["embed.weight"].named.aliases == ("head.weight",)
    assert "head.weight" not in tensors


# ------------------------------------------------------------------------------ replicas


def plain_replicas(options: dict[str, Any]) -> tuple[int, bool]:
    if options.pop("given"):
        options["replicas"] = dist.group.WORLD
    shards = ModelShards(build("plain", Awkward), Comm(), **options)
    return sum(s.tensor.numel() for s in shards.owned), shards.has_unknown_replicas


def test_plain_replicas_divide_once_their_group_is_given() -> None:
    total = sum(TRAINABLE[Awkward].values())
    unknown = run_ranks(plain_replicas, 2, {"given": False})
    given = run_ranks(plain_replicas, 2, {"given": True})
    whole = run_ranks(plain_replicas, 2, {"given": True, "shard_replicas": False})
    assert unknown == [(total, True)] * 2
    assert sum(count for count, _ in given) == total
    assert whole == [(total, False)] * 2


def replicas_that_differ(layout: str) -> str:
    model = build(layout, Awkward)
    if dist.get_rank() == 2:
        with torch.no_grad():
            model.get_parameter("module.one" if layout == "ddp" else "one").add_(1e-6)
    shards = ModelShards(model, Comm(), replicas=dist.group.WORLD)
    return error_of(shards.check_replicas, "testing")


@pytest.mark.parametrize("layout", ["ddp", "plain"])
def test_replicas_that_differ_are_named_with_tensor_and_ranks(layout: str) -> None:
    for text in run_ranks(replicas_that_differ, 3, layout):
        assert text.startswith("ReplicaMismatch: testing: one on ranks [2] differs from rank 0's")


class Ordered(nn.Module):
    """Two parameters of one shape, registered in an order of the caller's."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for value, name in enumerate(sorted(names)):
            self.__dict__[f"_{name}"] = float(value)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.full((3,), self.__dict__[f"_{name}"])))


def in_other_orders() -> tuple[list[str], list[float]]:
    model = Ordered("xy" if dist.get_rank() == 0 else "yx")
    averager = Averager(model, RULES, replicas=dist.group.WORLD)
    averager.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    averager.step()
    with averager.applied("ema"):
        pass
    owned = [shard.fqn for shard in averager["ema"].shards()]
    return owned, [*model.x.tolist(), *model.y.tolist()]


def test_ranks_divide_alike_though_their_models_have_other_orders() -> None:
    first, second = run_ranks(in_other_orders, 2)
    assert {*first[0], *second[0]} == {"x", "y"}
    assert first[1] == second[1] == [1.0] * 3 + [2.0] * 3


def sharded_replicas_that_differ(layout: str) -> str:
    model = build(layout, Uneven)
    if dist.get_rank() == 2:
        next(iter(storages(model).values()))[:1].add_(1e-3)
    return error_of(Averager, model, RULES)


@pytest.mark.parametrize(
    ("layout", "world_size", "other"),
    [("hsdp", 4, 0), ("fsdp1-no-shard", 3, 0), ("fsdp1-hybrid-flat", 4, 0)],
)
def test_replicas_of_shards_that_differ_are_named(layout: str, world_size: int, other: int) -> None:
    texts = run_ranks(sharded_replicas_that_differ, world_size, layout)
    name = "experts"  # the first tensor of the first storage
    for text in texts:
        assert text.startswith(
            f"ReplicaMismatch: building an Averager: {name} on ranks [2] differs"
        )
        assert f"from rank {other}'s" in text


def replicas_of_one_rank_only() -> str:
    model = Awkward()
    if dist.get_rank() == 1:
        model.extra = nn.Parameter(torch.zeros(2))
    return error_of(ModelShards, model, Comm(), replicas=dist.group.WORLD)


def test_a_parameter_of_one_replica_only_is_found() -> None:
    for text in run_ranks(replicas_of_one_rank_only, 2):
        assert text.startswith("ReplicaMismatch: ")
        assert "extra of shape (2,) is on ranks [1] only, of [0, 1]" in text


# ------------------------------------------------------------------------------ changes


def add_parameter(model: nn.Module) -> None:
    model.extra = nn.Parameter(torch.zeros(1))


def remove_parameter(model: nn.Module) -> None:
    del model.one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_parameter, "extra was added to the model"),
        (remove_parameter, "one was removed from the model"),
    ],
    ids=["added", "removed"],
)
def test_a_model_with_other_tensors_is_refused(change: Any, message: str) -> None:
    model = Awkward()
    shards = ModelShards(model, Comm())
    shards.follow()
    change(model)
    with pytest.raises(ModelMismatch, match=message):
        shards.follow()


def test_a_tensor_of_another_shape_is_refused() -> None:
    model = nn.Linear(2, 3)
    shards = ModelShards(model, Comm())
    model.weight = nn.Parameter(torch.zeros(5, 2))
    assert not shards.is_current
    with pytest.raises(ModelMismatch, match=r"weight has shape \(5, 2\) .* it had shape \(3, 2\)"):
        shards.follow()


def current_after_training(layout: str) -> tuple[bool, bool]:
    model = build(layout, Uneven)
    shards = ModelShards(model, Comm())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return shards.is_current, shards.follow()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_changes_no_storage(layout: str) -> None:
    assert run_ranks(current_after_training, 2, layout) == [(True, False)] * 2


# ------------------------------------------------------------------------------ other layouts


def sharded_by_columns() -> tuple[list[tuple[int, ...]], list[str]]:
    model = nn.Linear(4, 6)
    fully_shard(model, shard_placement_fn=lambda p: ShardPlacement(1 if p.ndim > 1 else 0))
    weights = weights_at(model, 1)
    set_weights(model, weights)
    shards = ModelShards(model, Comm())
    found = {s.fqn: s.tensor for s in shards.owned}
    expected = {s.fqn: weights[s.fqn][s.box.slices()] for s in shards.owned}
    return [s.box.sizes for s in shards.owned], differences(found, expected)


def test_fsdp2_may_shard_another_dim() -> None:
    assert run_ranks(sharded_by_columns, 2) == [([(6, 2), (3,)], [])] * 2


def test_meta_and_complex_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight is on the meta device"):
        ModelShards(nn.Linear(2, 2, device="meta"), Comm())
    model = nn.Module()
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match=r"phase is torch\.complex64"):
        ModelShards(model, Comm())
    with_other = nn.Linear(1, 1)
    with_other.phase = model.phase
    assert held(with_other, exclude=["phase"]) == {"weight", "bias"}
