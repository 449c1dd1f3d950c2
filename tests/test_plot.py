"""How much each step counts, against averages of one-hot vectors; and the command that draws it."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from distavg import EMA, SWA, Averager, Clock, ConfigError, PowerEMA, Rule, Warmup
from distavg.cli import main
from distavg.plot import rule_from_text, shares

CLOCK = Clock(steps_per_epoch=8, max_duration="5ep")


@pytest.mark.parametrize(
    "rule",
    [
        SWA(),
        SWA(start="0.5dur", end="35ba", update_interval="3ba", include_initial=True),
        EMA(0.9),
        EMA(half_life="4ba", update_interval="2ba", warmup=Warmup()),
        EMA(0.8, include_initial=True),
        PowerEMA(0.1, update_interval="5ba"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_shares_are_those_of_one_hot_weights(rule: Rule) -> None:
    """After step s the weights are 1 at s and 0 elsewhere, so that the average shows the shares."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(41, dtype=torch.float64))])
    (weights,) = model.parameters()
    weights.data[0] = 1
    averager = Averager(model, {"a": rule}, clock=CLOCK)
    for step in range(1, 41):
        with torch.no_grad():
            weights.zero_()[step] = 1
        averager.step()
    expected = averager.full_state_dict()["0"]
    found = torch.zeros_like(expected)
    for step, share in shares(rule, CLOCK):
        found[step] = share
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert found.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("ema", EMA()),
        ("ema:0.9", EMA(0.9)),
        ("ema:half_life=1000ba", EMA(half_life="1000ba")),
        ("power:0.05", PowerEMA(0.05)),
        ("swa:start=0.75dur,update_interval=10ba", SWA(start="0.75dur", update_interval="10ba")),
    ],
)
def test_rules_as_text(text: str, rule: Rule) -> None:
    assert rule_from_text(text) == rule


@pytest.mark.parametrize("text", ["", "lawa:5", "swa:0.5", "ema:decay=much", "power", "custom:f"])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(ConfigError):
        rule_from_text(text)


def test_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "weights.png"
    rules = ["--rule", "ema:half_life=50ba", "--rule", "power:0.1", "--rule", "swa:start=0.75dur"]
    arguments = ["plot", *rules, "--duration", "20ep", "--steps-per-epoch", "10", "-o", str(path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rule", "swa", "--duration", "100ba"], "'1ep' needs the number of optimizer steps"),
        (["--rule", "swa:x", "--duration", "100ba"], "not a rule of this release"),
        (["--rule", "ema", "--duration", "long"], "'long' is not a time"),
    ],
)
def test_clear_errors(arguments: list[str], text: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plot", *arguments, "-o", str(tmp_path / "a.png")])
    assert result.exit_code == 2
    assert text in result.output
    assert not (tmp_path / "a.png").exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    arguments = ["plot", "--rule", "ema", "--duration", "9ba", "-o", str(tmp_path / "a.png")]
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "pip install 'distavg[plot]'" in result.output
