"""Every wrapper in its further forms, in real training, against the whole weights of each step.

Models train with a real optimizer; the oracle is a lerp over whole live weights, which are gathered
by PyTorch's own means after each step. test_averager.py and test_swap.py have the plain forms.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import ONCE, RULES, differences, error_of, outputs, outputs_with, same, torch_average
from models import (
    FSDP1_OPTIONS,
    TokenModel,
    Uneven,
    backward,
    build,
    flat_parameters,
    in_fsdp1,
    mesh_of,
    set_weights,
    weights_at,
    whole_weights,
)
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from distavg import Averager, UnsupportedError
from distavg.comm import Comm
from distavg.shards import ModelShards
from distavg.wrappers import Wrapped, stays


def in_fsdp2(model: TokenModel, **options: Any) -> nn.Module:
    for name in model.sharded_apart:
        fully_shard(model.get_submodule(name), mesh=mesh_of("fsdp2"), **options)
    return fully_shard(model, mesh=mesh_of("fsdp2"), **options)


def plain() -> Uneven:
    model = Uneven()
    model.reset()
    return model


def mixed_fsdp2() -> nn.Module:
    return in_fsdp2(Experts(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def offloaded_fsdp2() -> nn.Module:
    return in_fsdp2(plain(), offload_policy=CPUOffloadPolicy(pin_memory=False))


def from_meta() -> nn.Module:
    with torch.device("meta"):
        model = Uneven()
    model.head.weight = model.embed.weight
    sharded = in_fsdp2(model)
    assert "on the meta device" in error_of(lambda: Averager(sharded, RULES))
    sharded.to_empty(device="cpu")
    model.reset()
    return sharded


def kept_unsharded() -> nn.Module:
    model = in_fsdp2(plain())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(False)
    return model


def by_columns() -> nn.Module:
    """Sharded along another dim, where FSDP2 needs an even one."""
    size = dist.get_world_size()

    def placement(parameter: nn.Parameter) -> ShardPlacement | None:
        even = [d for d, n in enumerate(parameter.shape) if d and n % size == 0]
        return ShardPlacement(even[-1]) if even else None

    return in_fsdp2(plain(), shard_placement_fn=placement)


def mixed_fsdp1() -> nn.Module:
    mixed = MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=False)
    return in_fsdp1(Experts(), use_orig_params=True, mixed_precision=mixed)


def mixed_fsdp1_flat() -> nn.Module:
    options = FSDP1_OPTIONS["fsdp1-grad-op-flat"]
    return in_fsdp1(
        Experts(), mixed_precision=MixedPrecision(param_dtype=torch.bfloat16), **options
    )


def experts_apart() -> nn.Module:
    """Stacked experts on a mesh of their own, the rest over all ranks."""
    model = Experts()
    model.reset()
    mesh = init_device_mesh(
        "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("rest", "expert")
    )
    fully_shard(model.experts, mesh=mesh["expert"])
    return fully_shard(model, mesh=mesh_of("fsdp2"))


class Experts(TokenModel):
    """Three experts, stacked, behind an embedding."""

    sharded_apart = ("experts",)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocabulary, 4)
        self.experts = Stacked()
        self.head = nn.Linear(4, self.vocabulary)
        self.reset()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch,) to logits (batch, vocabulary)."""
        logits: Tensor = self.head(self.experts(self.embed(tokens)))
        return logits


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4, 4))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("bi,eij->bj", hidden, self.weight)


def sequence_parallel() -> nn.Module:
    """Norms that are replicated DTensors, beside plain parameters."""
    model = Normed()
    model.reset()
    parallelize_module(model, mesh_of("tp"), {"norm": SequenceParallel()})
    return model


class Normed(TokenModel):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.vocabulary, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, self.vocabulary)
        self.reset()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch,) to logits (batch, vocabulary)."""
        hidden = self.embed(tokens).view(1, -1, 4)
        if isinstance(self.norm.weight, DTensor):
            mesh = self.norm.weight.device_mesh
            hidden = DTensor.from_local(hidden, mesh, [Replicate()])
            hidden = hidden.redistribute(placements=[ShardPlacement(1)])
        hidden = self.norm(hidden)
        hidden = hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
        logits: Tensor = self.head(hidden.view(-1, 4))
        return logits


def checkpointed() -> nn.Module:
    model = plain()
    model.block = checkpoint_wrapper(model.block)  # type: ignore[assignment]
    return fully_shard(model, mesh=mesh_of("fsdp2"))


def checkpointed_ddp() -> nn.Module:
    model = plain()
    model.block = checkpoint_wrapper(model.block)  # type: ignore[assignment]
    return DistributedDataParallel(model)


FORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "fsdp2 in bf16": (mixed_fsdp2, 2),
    "fsdp2 offloaded": (offloaded_fsdp2, 2),
    "fsdp2 from meta": (from_meta, 3),
    "fsdp2 kept unsharded": (kept_unsharded, 2),
    "fsdp2 by columns": (by_columns, 2),
    "fsdp1 in bf16": (mixed_fsdp1, 2),
    "fsdp1 flat, grad op, in bf16": (mixed_fsdp1_flat, 2),
    "experts on their own mesh": (experts_apart, 4),
    "sequence parallel": (sequence_parallel, 2),
    "activation checkpoints, fsdp2": (checkpointed, 2),
    "activation checkpoints, ddp": (checkpointed_ddp, 2),
}


def canonical(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make(form: str) -> nn.Module:
    return FORMS[form][0]() if form in FORMS else build(form, Uneven)


def train(form: str, with_averager: bool) -> tuple[dict[str, Tensor], list[str], int]:
    """The last live weights, what was wrong with the averages, and the elements held here."""
    model = make(form)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    wrong: list[str] = []
    oracles: dict[str, dict[str, Tensor]] = {rule: {} for rule in RULES}
    averager = None
    if with_averager:
        alike = form in ("tp", "sequence parallel")
        averager = Averager(model, RULES, replicas=dist.group.WORLD if alike else None)
        averager.attach(optimizer)
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        whole = {canonical(name): weight for name, weight in whole_weights(model).items()}
        if averager is None:
            continue
        for rule, oracle in oracles.items():
            for name, weight in whole.items():
                if step == 0:
                    oracle[name] = weight.clone()
                else:
                    oracle[name].lerp_(weight, 1 - 0.9 if rule == "ema" else 1 / (step + 1))
        if step in (1, 2):
            model.eval()
            before = outputs(model, step)
            with averager.applied("ema"):
                outputs(model, step)
                inside = {canonical(n): w for n, w in whole_weights(model).items()}
                has_moved = not same(outputs(model, step), before)
            wrong += [] if has_moved else [f"forwards do not see the average at {step}"]
            wrong += [] if same(outputs(model, step), before) else [f"not the live ones at {step}"]
            wrong += differences(inside, {**whole, **averaged(oracles["ema"], model)})
            model.train()
    if averager is None:
        return whole, wrong, 0
    for rule, oracle in oracles.items():
        found = averager.full_state_dict(rule, all_ranks=True)
        expected = averaged(oracle, model)
        wrong += differences({name: found[name] for name in expected}, expected)
    return whole, wrong, sum(shard.tensor.numel() for shard in averager["ema"].shards())


def averaged(oracle: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in oracle.items() if name != "frozen"}


def trained_twice(form: str) -> tuple[list[str], list[str], int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about gloo and about what is deprecated
        alone, _, _ = train(form, with_averager=False)
        live, wrong, held = train(form, with_averager=True)
    total = sum(tensor.numel() for tensor in averaged(live, nn.Module()).values())
    return wrong, differences(live, alone), held, total


@pytest.mark.parametrize(
    ("form", "world_size"), [*((form, size) for form, (_, size) in FORMS.items()), *ONCE]
)
def test_training_with_averages_in_and_out(form: str, world_size: int) -> None:
    """Averages are right, hold nothing twice, and training goes on as if there were none."""
    results = run_ranks(trained_twice, world_size, form)
    for wrong, disturbed, _, _ in results:
        assert wrong == []
        assert disturbed == []
    if form != "plain":
        assert sum(held for _, _, held, _ in results) == results[0][3]


def offloaded_fsdp1() -> list[str]:
    """Without a GPU FSDP1 cannot pin memory, nor run an offloaded backward: only forwards."""
    with mock.patch.object(Tensor, "pin_memory", lambda self: self):
        offload = CPUOffload(offload_params=True)
        model = in_fsdp1(plain(), use_orig_params=True, cpu_offload=offload).eval()
        averager = Averager(model, RULES)
        wrong = []
        for step in range(3):
            set_weights(model, weights_at(model, step))
            averager.step()
            outputs(model)
        for rule in RULES:
            average = torch_average(Uneven, rule, range(3))
            wrong += differences(averager.full_state_dict(rule, all_ranks=True), average)
            with averager.applied(rule):
                wrong += [] if same(outputs(model), outputs_with(Uneven, average)) else [rule]
        live = outputs_with(Uneven, weights_at(Uneven(), 2))
        return wrong if same(outputs(model), live) else [*wrong, "live"]


def test_fsdp1_offloaded_to_the_host() -> None:
    assert run_ranks(offloaded_fsdp1, 2) == [[], []]


def inside_summon(flat: bool) -> tuple[list[str], list[str]]:
    """What calls raise inside `summon_full_params`, and what they change."""
    model = build("fsdp1-flat" if flat else "fsdp1", Uneven)
    averager = Averager(model, RULES)
    outputs(model)
    averager.step()
    before = whole_weights(model)
    with FullyShardedDataParallel.summon_full_params(model):
        texts = [error_of(averager.full_state_dict, "ema"), error_of(averager.copy_to, None, "ema")]
        texts.append(error_of(averager.applied("ema").__enter__))
    return texts, differences(whole_weights(model), before)


@pytest.mark.parametrize("flat", [False, True])
def test_fsdp1_inside_summon_full_params_is_refused(flat: bool) -> None:
    for texts, changed in run_ranks(inside_summon, 2, flat):
        assert changed == []
        for text in texts:
            assert text.startswith("StateError: inside FullyShardedDataParallel.summon_full_params")


def moved_before_the_first_forward() -> list[str]:
    model = build("fsdp1", Uneven)
    averager = Averager(model, RULES)
    model.double()
    for parameter in flat_parameters(model).values():
        with torch.no_grad():
            parameter.fill_(3.0)
    averager.step()
    return [s.fqn for s in averager["ema"].shards() if not bool((s.tensor == 3.0).all())]


def test_fsdp1_that_moves_before_its_first_forward_is_followed() -> None:
    assert run_ranks(moved_before_the_first_forward, 2) == [[], []]


# ---------------------------------------------------------------- placements


def distributed(
    placements: list[Any], shapes: list[tuple[int, ...]]
) -> list[tuple[list[str], str]]:
    """What `Wrapped` finds of DTensors of these placements, against the tensors' own parts."""
    mesh = init_device_mesh("cpu", (2, 2))
    return [found_of(mesh, placements, shape) for shape in shapes]


def found_of(
    mesh: DeviceMesh, placements: list[Any], shape: tuple[int, ...]
) -> tuple[list[str], str]:
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    module = nn.Module()
    try:
        module.weight = nn.Parameter(distribute_tensor(whole, mesh, placements))
        wrapped = Wrapped(module)
        (tensor,) = (wrapped.locate(each, range(4)) for each in wrapped.named_tensors())
    except UnsupportedError as error:
        return [], str(error)
    local = module.weight.to_local()
    wrong = [] if sum(p.tensor.numel() for p in tensor.parts) == local.numel() else ["numel"]
    return wrong + [
        str(part.box) for part in tensor.parts if not same(part.tensor, whole[part.box.slices()])
    ], "understood"


@pytest.mark.parametrize(
    "placements",
    [
        [ShardPlacement(0), ShardPlacement(0)],
        [ShardPlacement(0), ShardPlacement(1)],
        [Replicate(), ShardPlacement(1)],
        [ShardPlacement(1), Replicate()],
        [_StridedShard(0, split_factor=2), ShardPlacement(0)],
        [Replicate(), Replicate()],
    ],
    ids=str,
)
def test_placements_give_the_boxes_that_the_values_prove(placements: list[Any]) -> None:
    shapes = [(8, 6), (5, 3), (1, 7)]
    if isinstance(placements[0], _StridedShard):
        shapes = shapes[:1]  # uneven ones are FSDP2's alone to make: see the tests of tp-fsdp2
    assert run_ranks(distributed, 4, placements, shapes) == [[([], "understood")] * len(shapes)] * 4


def test_placements_that_are_not_contiguous_are_refused() -> None:
    strided = [ShardPlacement(0), _StridedShard(0, split_factor=2)]
    for ((_, how),) in run_ranks(distributed, 4, strided, [(8, 6)]):
        assert "these are not the contiguous pieces" in how


def partial() -> str:
    mesh = init_device_mesh("cpu", (2,))
    module = nn.Module()
    module.weight = nn.Parameter(DTensor.from_local(torch.ones(8, 6), mesh, [Partial()]))
    return error_of(Averager, module, RULES)


def test_sums_that_are_not_added_up_are_refused() -> None:
    for text in run_ranks(partial, 2):
        assert "these are not the contiguous pieces" in text


def replaced_on_its_storage(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach())


def tied(module: nn.Linear) -> None:
    module.other = module.weight


def set_data(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Linear], None]:
    def apply(module: nn.Linear) -> None:
        module.weight.data = change(module.weight.data)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        replaced_on_its_storage,
        tied,
        set_data(Tensor.t),
        set_data(Tensor.clone),
        set_data(lambda data: data[:2]),
        set_data(lambda data: data.view(torch.float16)),
    ],
)
def test_what_is_not_quite_the_same_does_not_stay(change: Callable[[nn.Linear], None]) -> None:
    module = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    (named,) = Wrapped(module).named_tensors()
    old = Wrapped(module).locate(named)
    set_weights(module, {"weight": torch.ones(4, 4)})
    (now,) = Wrapped(module).named_tensors()
    assert stays(old, now)
    change(module)
    (now,) = Wrapped(module).named_tensors()
    assert not stays(old, now)


def stored_by_columns(flat: bool) -> list[str]:
    whole = torch.arange(35.0).view(7, 5).t()
    model = nn.Linear(7, 5, bias=False)
    model.weight = nn.Parameter(whole.clone(memory_format=torch.preserve_format))
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=not flat, device_id=torch.device("cpu")
    )
    owned = ModelShards(wrapped, Comm()).owned
    assert owned
    return [str(each.box) for each in owned if not same(each.tensor, whole[each.box.slices()])]


@pytest.mark.parametrize("flat", [False, True])
def test_fsdp1_keeps_the_order_in_memory_of_a_transposed_parameter(flat: bool) -> None:
    assert run_ranks(stored_by_columns, 2, flat) == [[], []]


def ignored_by_ddp() -> tuple[list[str], str]:
    model = nn.Linear(3, 3)
    nn.init.constant_(model.bias, dist.get_rank())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["bias"])
    shards = ModelShards(DistributedDataParallel(model), Comm())
    return [t.fqn for t in shards.tensors if t.is_alike], error_of(shards.check_replicas, "x")


def test_parameters_that_ddp_was_told_to_ignore_may_differ() -> None:
    assert run_ranks(ignored_by_ddp, 2) == [(["weight"], "nothing")] * 2


def currents(layout: str) -> list[bool]:
    """Whether nothing seems to have changed: before the first forward, and after some."""
    model = build(layout, Uneven)
    shards = ModelShards(model, Comm())
    found = [shards.is_unchanged]
    outputs(model)
    found.append(shards.is_unchanged)
    backward(model)
    return [*found, shards.is_unchanged]


@pytest.mark.parametrize("layout", ["fsdp1", "fsdp1-flat", "fsdp1-grad-op", "fsdp2", "fsdp2-keep"])
def test_forwards_and_backwards_change_nothing(layout: str) -> None:
    assert run_ranks(currents, 2, layout) == [[True] * 3] * 2


def on_a_descending_mesh() -> str:
    model = fully_shard(nn.Linear(3, 4), mesh=DeviceMesh("cpu", [1, 0]))
    return error_of(Averager, model, RULES)


def test_meshes_that_do_not_ascend_are_refused() -> None:
    text = run_ranks(on_a_descending_mesh, 2)[0]
    assert "weight is on a mesh of the ranks [1, 0], which are not in ascending order" in text


# ---------------------------------------------------------------- private ways of the wrappers


def private_ways() -> list[str]:
    """What distavg/wrappers.py uses and does not find."""
    sharded = build("fsdp2", Uneven)
    backward(sharded)
    flat = build("fsdp1-grad-op", Uneven)
    backward(flat)
    assert isinstance(sharded, FSDPModule)
    assert isinstance(flat, FullyShardedDataParallel)
    state: Any = sharded._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    handle: Any = flat._handle
    wanted = [
        (groups[0], "fsdp_params wait_for_unshard _to_sharded"),
        (groups[0].fsdp_params[0], "sharded_param _module_info _unsharded_param"),
        (groups[0].fsdp_params[0]._module_info, "module param_name"),
        (groups[0].fsdp_params[0].sharded_param, "_local_tensor"),
        (handle, "flat_param uses_sharded_strategy reshard _prefetched _training_state"),
        (
            handle.flat_param,
            "_local_shard _full_param_padded _param_infos _shared_param_infos _shard_param_infos "
            "_params _tensors _shapes _strides _contiguities _numels_with_padding _sharded_size "
            "_param_extensions",
        ),
    ]
    return [
        f"{type(owner).__name__}.{name}"
        for owner, names in wanted
        for name in names.split()
        if not hasattr(owner, name)
    ]


def test_the_private_attributes_are_where_they_were() -> None:
    for moved in run_ranks(private_ways, 2):
        assert moved == [], f"torch {torch.__version__} moved {moved}: see distavg/wrappers.py"
