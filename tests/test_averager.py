"""The face of the package: the same bits on every layout, nothing twice, clear refusals."""

from __future__ import annotations

import gc
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import (
    CASES,
    MULTI_AVG_FNS,
    ONCE,
    RULES,
    cloned,
    communications,
    differences,
    error_of,
    feed,
    model_class,
    same,
    storages,
    timed_error_of,
    torch_average,
    trained,
)
from models import (
    Awkward,
    TokenModel,
    Uneven,
    backward,
    build,
    set_weights,
    unwrapped,
    weights_at,
    whole_weights,
)
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import distavg
from distavg import (
    EMA,
    SWA,
    Averager,
    Clock,
    ConfigError,
    StateError,
    UnsupportedError,
)

# ---------------------------------------------------------------- values


def wrong_averages(layout: str, cls: type[TokenModel]) -> list[str]:
    """The tensors of averages that are not PyTorch's, bit for bit."""
    _, averager = trained(layout, cls, range(5))
    wrong = []
    for name in averager.names:
        found = averager.full_state_dict(name, all_ranks=True)
        expected = torch_average(cls, name, range(5))
        wrong += [f"{name}: {fqn}" for fqn in differences(found, expected)]
    return wrong


@pytest.mark.parametrize(
    ("layout", "world_size", "cls"),
    [
        *((layout, size, model_class(layout)) for layout, size in CASES),
        ("ddp", 3, Uneven),
    ],
)
def test_every_layout_gives_the_bits_of_torch_on_the_whole_model(
    layout: str, world_size: int, cls: type[TokenModel]
) -> None:
    assert run_ranks(wrong_averages, world_size, layout, cls) == [[]] * world_size


def test_without_a_process_group_as_well() -> None:
    assert wrong_averages("plain", Awkward) == []


def bytes_held(layout: str) -> list[int]:
    _, averager = trained(layout, model_class(layout), ())
    return [averager[name].nbytes for name in averager.names]


@pytest.mark.parametrize(("layout", "world_size"), [case for case in CASES if case[0] != "plain"])
def test_nothing_is_held_twice(layout: str, world_size: int) -> None:
    total = sum(w.nbytes for w in weights_at(model_class(layout)(), 0).values())
    held = run_ranks(bytes_held, world_size, layout)
    assert [sum(column) for column in zip(*held, strict=True)] == [total, total]
    if layout == "ddp":
        largest_row = 7 * 4  # Awkward's widest last dim, in fp32
        for row in held:
            assert max(row) <= total / world_size + largest_row


def collectives_of_updates(layout: str) -> int:
    _, averager = trained(layout, model_class(layout))

    def update() -> None:
        averager.step()
        averager.update("ema")
        averager.metrics()
        averager.synchronize()

    counted = communications(update)
    assert communications(lambda: averager.full_state_dict("ema")) > 0  # so the check can fail
    return counted


@pytest.mark.parametrize(("layout", "world_size"), [case for case in ONCE if case[0] != "plain"])
def test_updates_communicate_nothing(layout: str, world_size: int) -> None:
    assert run_ranks(collectives_of_updates, world_size, layout) == [0] * world_size


def updates_alone() -> bool:
    """Rank 0 updates while rank 1 has other things to do: nobody waits."""
    _, averager = trained("ddp", Awkward, timeout=timedelta(seconds=2))
    if dist.get_rank() == 0:
        for _ in range(3):
            averager.step()
    return averager["ema"].num_updates == (6 if dist.get_rank() == 0 else 3)


def test_one_rank_may_update_without_the_others() -> None:
    assert run_ranks(updates_alone, 2) == [True, True]


def half_precision(layout: str) -> list[str]:
    """fp32 averages of bf16 weights that differ from AveragedModel over the same values in fp32."""
    cls = model_class(layout)
    model = build(layout, cls, torch.bfloat16)
    averager = Averager(model, {"fp32": EMA(0.9), "bf16": EMA(0.9)}, dtype={"bf16": torch.bfloat16})
    reference = {
        torch.float32: build("plain", cls),
        torch.bfloat16: build("plain", cls, torch.bfloat16),
    }
    averaged = {
        dtype: AveragedModel(plain, multi_avg_fn=MULTI_AVG_FNS["ema"])
        for dtype, plain in reference.items()
    }
    for step in range(4):
        weights = weights_at(model, step)
        set_weights(model, weights)
        averager.step()
        for dtype, plain in reference.items():
            set_weights(plain, {n: w.to(dtype) for n, w in weights.items()})
            averaged[dtype].update_parameters(plain)
    wrong = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found = averager.full_state_dict(name, all_ranks=True)
        expected = averaged[dtype].module.state_dict()
        fqns = weights_at(model, 0)
        wrong += differences({n: found[n] for n in fqns}, {n: expected[n] for n in fqns})
    return wrong


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_bf16_weights_are_averaged_in_the_dtype_of_each_average(layout: str) -> None:
    assert run_ranks(half_precision, 2, layout) == [[], []]


def selected(layout: str) -> tuple[list[str], list[str]]:
    model = build(layout, Uneven)
    averager = Averager(model, EMA(0.5), include=["module.*", "one", "head.*"], exclude=["*.bias"])
    set_weights(model, weights_at(model, 1))
    averager.step()
    set_weights(model, weights_at(model, 2))
    averager.step()
    one, two = weights_at(model, 1), weights_at(model, 2)
    found = averager.full_state_dict(all_ranks=True)
    averaged = [n for n in two if same(found[n], torch.lerp(one[n], two[n], 0.5))]
    return averaged, [n for n in two if same(found[n], two[n])]


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_what_is_not_selected_reads_as_live(layout: str) -> None:
    for averaged, live in run_ranks(selected, 2, layout):
        assert sorted(averaged) == ["embed.weight", "module.weight", "one"]
        assert sorted(averaged + live) == sorted(weights_at(Uneven(), 0))


def frozen_is_not_held(layout: str) -> list[str]:
    model, averager = trained(layout, model_class(layout))
    parameter = dict(unwrapped(model).named_parameters())["frozen"]
    assert not parameter.requires_grad
    return [shard.fqn for shard in averager["ema"].shards() if shard.fqn == "frozen"]


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_frozen_parameters_are_not_held(layout: str) -> None:
    assert run_ranks(frozen_is_not_held, 2, layout) == [[], []]


def before_the_first_update(layout: str) -> list[str]:
    cls = model_class(layout)
    model = build(layout, cls)
    averager = Averager(model, EMA(0.5, start="3ba"))
    wrong = []
    for step in range(3):
        set_weights(model, weights_at(model, step))
        averager.step()
        found = averager.full_state_dict(all_ranks=True)
        wrong += differences({n: found[n] for n in weights_at(model, 0)}, weights_at(model, step))
        with averager.applied():
            pass
    assert averager["ema"].num_updates == 0
    return wrong


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_before_its_first_update_an_average_reads_as_live(layout: str) -> None:
    assert run_ranks(before_the_first_update, 2, layout) == [[], []]


# ---------------------------------------------------------------- when it updates


def test_update_by_hand_counts_updates_and_not_steps() -> None:
    model = build("plain", Awkward)
    averager = Averager(model, SWA(update_interval=None))
    for step in range(3):
        set_weights(model, weights_at(model, step))
        averager.step()
        if step != 1:
            averager.update()
    assert (averager.step_count, averager["swa"].num_updates) == (3, 2)
    found = averager.full_state_dict()
    expected = torch_average(Awkward, "swa", [0, 2])
    weights = weights_at(model, 0)
    assert differences({n: found[n] for n in weights}, {n: expected[n] for n in weights}) == []


def test_schedules_decide_which_steps_count() -> None:
    model = build("plain", Awkward)
    averager = Averager(
        model,
        {"swa": SWA(start="0.5dur", update_interval="1ep"), "ema": EMA(0.9, update_interval="2ba")},
        clock=Clock(steps_per_epoch=3, max_duration="4ep"),
    )
    feed(averager, model, range(12))
    assert averager["swa"].num_updates == 2  # after steps 9 and 12
    assert averager["ema"].num_updates == 6
    weights = weights_at(model, 0)
    for name, steps in (("swa", [8, 11]), ("ema", [1, 3, 5, 7, 9, 11])):
        found, expected = averager.full_state_dict(name), torch_average(Awkward, name, steps)
        assert differences({n: found[n] for n in weights}, {n: expected[n] for n in weights}) == []


def goes_on_from_the_average(layout: str) -> tuple[list[int], list[str], list[str]]:
    """An average becomes the live weights at its end, and training goes on from there."""
    cls = model_class(layout)
    rule = SWA(start="2ba", end="5ba", update_interval="1ba")
    model, averager = trained(layout, cls, (), rules={"swa": rule})
    overs = []
    for step in range(4):
        feed(averager, model, [step])
        overs += [averager.step_count] if averager.is_over() else []
    feed(averager, model, [4])
    overs += [averager.step_count] if averager.is_over("swa") else []
    averager.copy_to()
    expected = torch_average(cls, "swa", range(2, 5))
    live = whole_weights(model)
    wrong = differences(live, {name: expected[name] for name in live})
    backward(model)
    feed(averager, model, [5])
    average = averager.full_state_dict(all_ranks=True)
    wrong += differences({n: average[n] for n in live}, {n: expected[n] for n in live})
    after = differences(whole_weights(model), {**live, **weights_at(model, 5)})
    return overs, wrong, after


@pytest.mark.parametrize(("layout", "world_size"), ONCE)
def test_an_average_becomes_the_live_weights_at_its_end(layout: str, world_size: int) -> None:
    for overs, wrong, after in run_ranks(goes_on_from_the_average, world_size, layout):
        assert overs == [5]
        assert wrong == []
        assert after == []


@pytest.mark.parametrize(
    ("end", "buffers", "is_warned"),
    [
        ("3.5ep", "live", True),
        ("0.9dur", "live", True),
        ("3ep", "live", False),
        ("3.5ep", "averaged", False),
        (None, "live", False),
    ],
)
def test_an_end_in_the_last_epoch_of_a_model_with_batchnorm_is_warned_of(
    end: str | None, buffers: str, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(steps_per_epoch=4, max_duration="4ep")
    rule = SWA(end=end, update_interval="1ba")
    for norm, expected in ((nn.BatchNorm1d(2), is_warned), (nn.LayerNorm(2), False)):
        caplog.clear()
        Averager(nn.Sequential(nn.Linear(2, 2), norm), rule, clock=clock, buffers=buffers)
        assert ("'swa' ends in the last epoch of a model with BatchNorm" in caplog.text) == expected


def test_the_initial_weights_count_on_request() -> None:
    for start, initial in (("0ba", 0), ("2ba", 2)):
        model = build("plain", Awkward)
        averager = Averager(model, EMA(0.9, start=start, include_initial=True))
        feed(averager, model, range(1, 5))  # step n ends with the weights of n; 0 is the start
        assert averager["ema"].num_updates == 5 - initial
        found = averager.full_state_dict()
        expected = torch_average(Awkward, "ema", range(initial, 5))
        weights = weights_at(model, 0)
        assert differences({n: found[n] for n in weights}, {n: expected[n] for n in weights}) == []


# ---------------------------------------------------------------- names and arguments


def test_a_rule_alone_is_named_by_its_kind() -> None:
    assert Averager(nn.Linear(1, 1), EMA()).names == ("ema",)
    assert Averager(nn.Linear(1, 1), SWA(update_interval=None)).names == ("swa",)


def test_names_that_are_unknown_or_ambiguous() -> None:
    averager = Averager(nn.Linear(1, 1), RULES)
    calls: list[Any] = [
        averager.update,
        averager.applied,
        averager.full_state_dict,
        averager.iter_full_tensors,
        lambda name=None: averager.copy_to(None, name),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"several averages: name one of \['ema', 'swa'\]"):
            call()
        with pytest.raises(ConfigError, match=r"no average 'emma', only \['ema', 'swa'\]"):
            call("emma")
    with pytest.raises(ConfigError, match="no average 'emma'"):
        averager["emma"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": {}}, "is not a rule, nor a mapping"),
        ({"rules": {"a b": EMA()}}, "a name is letters, digits"),
        ({"rules": {"../up": EMA()}}, "a name is letters, digits"),
        ({"rules": {"ema": 0.9}}, "0.9 is not a rule such as EMA"),
        ({"dtype": {"emma": torch.float32}}, r"dtype names \['emma'\], the averages \['ema'\]"),
        ({"buffers": "frozen"}, "buffers='frozen' is not"),
        ({"rules": SWA()}, "average 'swa': '1ep' needs the number of optimizer steps in an epoch"),
        ({"include": ["nothing"]}, "include or exclude: 'nothing' matches no parameter or buffer"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Averager(nn.Linear(1, 1), **{"rules": EMA(), **arguments})


def refused_on_one_rank(what: str) -> str:
    model = build("ddp", Awkward)
    is_odd = dist.get_rank() == 1
    if what == "rule":
        rule = SWA() if is_odd else EMA()
        return error_of(Averager, model, rule)
    if what == "replica":
        with torch.no_grad():
            unwrapped(model).get_parameter("transposed").add_(1.0 if is_odd else 0.0)
        return error_of(Averager, model, EMA())
    plain = nn.Linear(2, 2, device="meta" if is_odd else "cpu")
    return error_of(Averager, plain, EMA())


@pytest.mark.parametrize(
    ("what", "type_name", "message"),
    [
        ("rule", "ConfigError", "'1ep' needs the number of optimizer steps in an epoch"),
        ("meta", "ConfigError", "weight is on the meta device"),
        ("replica", "ReplicaMismatch", "transposed on ranks [1] differs from rank 0's"),
    ],
)
def test_what_one_rank_refuses_all_refuse(what: str, type_name: str, message: str) -> None:
    found = run_ranks(refused_on_one_rank, 3, what)
    for rank, text in enumerate(found):
        assert text.startswith(f"{type_name}: ")
        assert message in text
        assert rank == 1 or what == "replica" or "rank 1: " in text


def build_without_one() -> tuple[str, float] | None:
    model = build("plain", Awkward)
    if dist.get_rank() == 1:
        time.sleep(4)
        return None
    return timed_error_of(Averager, model, EMA(), timeout=timedelta(seconds=2))


def test_a_rank_that_never_builds_ends_the_wait() -> None:
    found = run_ranks(build_without_one, 2)[0]
    assert found is not None
    text, seconds = found
    assert text.startswith("RankError: making a group of the ranks: lost contact with rank 1")
    assert seconds < 5


# ---------------------------------------------------------------- layouts it finds


def unknown_replicas(options: dict[str, Any]) -> tuple[list[str], int]:
    """The warnings of this rank, and the bytes that it holds."""
    import logging

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distavg").addHandler(handler)
    try:
        averager = Averager(build("plain", Awkward), EMA(), **options)
    finally:
        logging.getLogger("distavg").removeHandler(handler)
    return records, averager["ema"].nbytes


def test_plain_models_of_several_ranks_are_kept_whole_and_said_so_once() -> None:
    total = sum(w.nbytes for w in weights_at(Awkward(), 0).values())
    (first, held), (second, also_held) = run_ranks(unknown_replicas, 2, {})
    assert len(first) == 1
    assert "Pass replicas=" in first[0]
    assert second == []
    assert held == also_held == total


def stages() -> list[str]:
    model = {"first": build("plain", Awkward), "second": build("plain", Uneven)}
    averager = Averager(model, EMA(0.9))
    for step in range(3):
        for stage in model.values():
            set_weights(stage, weights_at(stage, step))
        averager.step()
    found = averager.full_state_dict(all_ranks=True)
    expected = {
        f"{prefix}.{fqn}": tensor
        for prefix, cls in (("first", Awkward), ("second", Uneven))
        for fqn, tensor in torch_average(cls, "ema", range(3)).items()
    }
    return differences(found, expected)


def test_a_mapping_of_stages_is_one_model() -> None:
    assert run_ranks(stages, 2) == [[], []]


def compiled(layout: str) -> tuple[list[str], bool]:
    """A compiled model's average by canonical names; whether it evaluates with it."""
    cls = model_class(layout)
    model = build(layout, cls)
    wrapped: Any = torch.compile(model, backend="eager")
    averager = Averager(wrapped, EMA(0.9))
    feed(averager, model, range(3))
    expected = torch_average(cls, "ema", range(3))
    reference = build("plain", cls).eval()
    reference.load_state_dict(expected, strict=False)
    wrapped.eval()
    tokens = torch.tensor([0, 3, 4])
    with torch.no_grad():
        outside = wrapped(tokens)
        with averager.applied():
            is_right = torch.equal(wrapped(tokens), reference(tokens))
        is_right = is_right and torch.equal(wrapped(tokens), outside)
    return differences(averager.full_state_dict(all_ranks=True), expected), is_right


def test_a_compiled_model_is_the_same_model() -> None:
    assert run_ranks(compiled, 1, "plain") == [([], True)]


def unreplicated(layout: str) -> tuple[int, list[str], str]:
    """shard_replicas=False: whole copies, and a restore that needs no peer."""
    model = build(layout, Awkward)
    averager = Averager(model, RULES, shard_replicas=False)
    feed(averager, model, range(3))
    wrong = [
        f"{name}: {fqn}"
        for name in averager.names
        for fqn in differences(
            averager.full_state_dict(name, all_ranks=True), torch_average(Awkward, name, range(3))
        )
    ]
    with averager.applied("ema"):
        pass
    with torch.no_grad():
        if dist.get_rank() == 1:
            unwrapped(model).get_parameter("one").add_(1)
    return averager["ema"].nbytes, wrong, error_of(averager._shards.check_replicas, "x")


def test_whole_copies_on_request() -> None:
    total = sum(w.nbytes for w in weights_at(Awkward(), 0).values())
    for held, wrong, check in run_ranks(unreplicated, 2, "ddp"):
        assert held == total
        assert wrong == []
        assert check.startswith("ReplicaMismatch: ")


# ---------------------------------------------------------------- metrics


def metrics(layout: str) -> dict[str, float]:
    _, averager = trained(layout, model_class(layout))
    return averager.metrics(distance=True)


@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_metrics_count_each_element_once(layout: str) -> None:
    cls = model_class(layout)
    average = torch_average(cls, "swa", range(3))
    live = weights_at(cls(), 2)
    apart = sum((average[n].double() - w.double()).square().sum() for n, w in live.items()) ** 0.5
    norm = sum(w.double().square().sum() for w in live.values()) ** 0.5
    assert isinstance(apart, Tensor)
    for found in run_ranks(metrics, 3, layout):
        assert found["step_count"] == found["swa/num_updates"] == 3
        assert found["swa/next_weight"] == 0.25
        # Sums over other parts, in another order, in fp64: its rounding, and some to spare.
        assert found["swa/distance"] == pytest.approx(float(apart), rel=1e-12)
        assert found["swa/relative_distance"] == pytest.approx(float(apart / norm), rel=1e-12)


def test_metrics_of_an_average_without_updates() -> None:
    found = Averager(nn.Linear(2, 1), EMA(0.75)).metrics(distance=True)
    assert found == {
        "step_count": 0,
        "ema/num_updates": 0,
        "ema/next_weight": 1.0,
        "ema/bytes": 12,
        "ema/distance": 0.0,
        "ema/relative_distance": 0.0,
    }


def test_errors_are_of_the_documented_kinds() -> None:
    assert issubclass(StateError, RuntimeError)
    assert issubclass(ConfigError, ValueError)


def test_a_model_with_nothing_to_average_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable floating parameter"):
        Averager(model, EMA())


class Counting(nn.Module):
    """Its forward rebinds a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.linear(x)


def test_a_live_buffer_that_a_forward_rebinds_is_followed() -> None:
    model = Counting()
    averager = Averager(model, EMA())
    model(torch.ones(2))
    averager.step()
    with averager.applied():
        model(torch.ones(2))
    assert model.calls.item() == 1
    model(torch.ones(2))
    assert averager.full_state_dict()["calls"].item() == 2


def test_an_iterator_made_outside_and_run_inside_applied_gives_the_average() -> None:
    model = nn.Linear(2, 2)
    averager = Averager(model, EMA(0.5))
    averager.step()
    with torch.no_grad():
        model.weight.add_(1.0)
    averager.step()
    expected = averager.full_state_dict()
    tensors = averager.iter_full_tensors()
    with averager.applied():
        found = dict(tensors)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="a function is not a torch"):
        Averager(lambda x: x, EMA())  # type: ignore[arg-type]


def build_apart() -> list[str]:
    rank = dist.get_rank()

    def built(**options: Any) -> str:
        rules = options.pop("rules", EMA(0.5))
        return error_of(lambda: Averager(build("ddp", Uneven), rules, **options))

    return [
        built(rules=EMA(0.5 + rank / 4)),
        built(clock=Clock(steps_per_epoch=3 + rank)),
        built(dtype=torch.float64 if rank else None),
        built(exclude=["experts"] if rank else None),
    ]


def test_ranks_that_build_differently_are_refused() -> None:
    whats = ["the rules", "the clock", "the dtypes"]
    for rank, (*texts, tensor) in enumerate(run_ranks(build_apart, 2)):
        for text, what in zip(texts, whats, strict=True):
            assert text.startswith(f"ConfigError: building an Averager: {what} on rank {1 - rank}")
        assert tensor.startswith("ConfigError: experts is not the same on all ranks")


def apply_before_the_first_update(layout: str) -> tuple[list[str], bool, str, str]:
    model, averager = trained(layout, Uneven, ())
    refs = storages(model)
    before = cloned(refs)
    model.train()
    rng = torch.get_rng_state()
    with averager.applied("ema"):
        model.eval()
        torch.rand(3)
        inside = error_of(averager.step)
    assert torch.equal(torch.get_rng_state(), rng)

    def write() -> None:
        with averager.applied("ema"), torch.no_grad():
            next(iter(refs.values())).add_(1.0)

    return differences(refs, before), model.training, inside, error_of(write)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_applied_before_the_first_update_disturbs_nothing_either(layout: str) -> None:
    for changed, training, inside, written in run_ranks(apply_before_the_first_update, 2, layout):
        assert changed == []
        assert training
        assert inside.startswith("StateError: step() inside applied")
        assert "had no update yet, so the weight stays as it was written" in written


def test_optimizer_steps_inside_also_do_not_count(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    first, second = (torch.optim.AdamW([p]) for p in model.parameters())
    averager = Averager(model, EMA(0.5))
    averager.attach(first, second)

    def step_both(folder: Path) -> None:
        for optimizer in (first, second):
            get_optimizer_state_dict(model, optimizer)  # takes a step: there is no state yet

    def step_one(folder: Path) -> None:
        model.bias.grad = torch.zeros_like(model.bias)
        second.step()

    averager.save(tmp_path / "a", also=step_both)
    assert averager.step_count == 0
    averager.load(tmp_path / "a", also=step_one)
    first.step()
    assert averager.step_count == 0  # only the first of them has stepped
    second.step()
    assert averager.step_count == 1


def build_for_a_part_of_the_mesh() -> str:
    pair = dist.new_group([0, 1])
    model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (3,)))
    if dist.get_rank() == 2:
        return ""
    return error_of(lambda: Averager(model, EMA(), process_group=pair))


def test_a_mesh_larger_than_the_group_is_refused() -> None:
    for text in run_ranks(build_for_a_part_of_the_mesh, 3)[:2]:
        assert "weight is sharded over the ranks [0, 1, 2], of which the Averager has only" in text


def test_dtypes_that_cannot_be_saved_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("ids", torch.zeros(2, dtype=torch.uint16))
    with pytest.raises(UnsupportedError, match=r"ids is torch.uint16, which cannot be averaged"):
        Averager(model, EMA(), buffers="copied")
    Averager(model, EMA())


@pytest.mark.parametrize(
    "options", [{"dtype": "float32"}, {"clock": 10}, {"rules": {1: EMA()}}, {"rules": None}]
)
def test_arguments_of_the_wrong_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Averager(nn.Linear(2, 2), options.pop("rules", EMA()), **options)


def test_averagers_share_one_group() -> None:
    run_ranks(build_many_averagers, 2)


def build_many_averagers() -> None:
    def open_files() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    model = nn.Linear(2, 2)
    counts = []
    for _ in range(6):
        Averager(model, EMA())
        counts.append(open_files())
    assert counts[-1] <= counts[1], counts


def test_loading_the_latest_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"latest\(\) found no checkpoint"):
        Averager(nn.Linear(2, 2), EMA()).load(distavg.latest(tmp_path))
