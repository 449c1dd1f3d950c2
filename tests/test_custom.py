"""Custom rules: the functions of PyTorch's AveragedModel, on whatever layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import FEW, differences, error_of, feed, model_class
from models import Uneven, build, set_weights, weights_at
from ranks import run_ranks
from torch import Tensor
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from distavg import EMA, Averager, Custom


def documented(averaged: Tensor, live: Tensor, num_averaged: int) -> Tensor:
    """The lambda of PyTorch's documentation: "EMA of the parameters with 0.9 and 0.1"."""
    return 0.9 * averaged + 0.1 * live


FUNCTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "documented": lambda: {"avg_fn": documented},
    "swa": lambda: {"avg_fn": get_swa_avg_fn()},
    "ema": lambda: {"avg_fn": get_ema_avg_fn(0.75)},
    "swa, multi": lambda: {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema, multi": lambda: {"multi_avg_fn": get_ema_multi_avg_fn(0.75)},
}


def against_torch(layout: str) -> list[str]:
    cls = model_class(layout)
    wrong = []
    rules = {name.replace(", ", "-"): Custom(**get()) for name, get in FUNCTIONS.items()}
    model, plain = build(layout, cls), build("plain", cls)
    replicas = torch.distributed.group.WORLD if layout == "plain" else None
    averager = Averager(model, {**rules, "rule": EMA(0.9)}, replicas=replicas)
    theirs = {name: AveragedModel(plain, **rule) for name, rule in rules_of_torch().items()}
    for step in range(5):
        for each in (model, plain):
            set_weights(each, weights_at(plain, step))
        averager.step()
        for averaged in theirs.values():
            averaged.update_parameters(plain)
    for name, averaged in theirs.items():
        found = averager.full_state_dict(name, all_ranks=True)
        expected = averaged.module.state_dict()
        names = weights_at(plain, 0)
        wrong += [
            f"{name} {each}"
            for each in differences({n: found[n] for n in names}, {n: expected[n] for n in names})
        ]
    return wrong


def rules_of_torch() -> dict[str, dict[str, Any]]:
    return {name.replace(", ", "-"): get() for name, get in FUNCTIONS.items()}


@pytest.mark.parametrize(
    ("layout", "world_size"), [case for case in FEW if not case[0].startswith("tp")]
)
def test_functions_of_torch_give_the_bits_of_torch(layout: str, world_size: int) -> None:
    assert run_ranks(against_torch, world_size, layout) == [[]] * world_size


def test_functions_see_the_dtype_of_the_average() -> None:
    model = build("plain", Uneven, torch.bfloat16)
    seen = set()

    def mean(averaged: list[Tensor], live: list[Tensor], num_averaged: int) -> None:
        seen.update({tensor.dtype for tensor in averaged + live})
        torch._foreach_lerp_(averaged, live, 1 / (num_averaged + 1))

    averager = Averager(model, {"a": Custom(multi_avg_fn=mean), "swa": EMA(0.5)})
    feed(averager, model, range(3))
    assert seen == {torch.float32}
    assert averager["a"].num_updates == 3


def test_a_checkpoint_knows_a_function_by_its_name(tmp_path: Path) -> None:
    model = build("plain", Uneven)
    averager = Averager(model, {"a": Custom(avg_fn=documented)})
    feed(averager, model, range(3))
    averager.save(tmp_path / "a")
    before = averager.full_state_dict()
    feed(averager, model, range(3, 5))
    averager.load(tmp_path / "a")
    assert differences(averager.full_state_dict(), before) == []
    assert averager["a"].num_updates == 3

    other = Averager(model, {"a": EMA(0.9)})
    assert "avg_fn='documented'" in error_of(other.load, tmp_path / "a")
    text = error_of(other.load, tmp_path / "a", rules="saved")
    assert "a custom rule's functions are not in the file, only their names" in text
    other.load(tmp_path / "a", rules="current")
    assert differences(other.full_state_dict(), before) == []
