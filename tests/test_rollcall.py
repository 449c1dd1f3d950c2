"""Errors of lost ranks: whom they name, and what that costs while nobody is lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import error_of, timed_error_of, trained
from models import Uneven, batch
from ranks import run_ranks
from torch import Tensor

from distavg.comm import Comm

TIMEOUT = timedelta(seconds=3)
CASES = [
    ("gather", "stuck"),
    ("broadcast", "stuck"),
    ("gather_to_first", "dead"),
    ("add_up", "dead"),
    ("exchange", "dead"),
]


def call(ranks: Comm, collective: str) -> object:
    calls: dict[str, Any] = {
        "gather": lambda: ranks.gather(1, "testing"),
        "gather_to_first": lambda: ranks.gather_to_first(1, "testing"),
        "broadcast": lambda: ranks.broadcast(1, "testing", source=2),
        "exchange": lambda: ranks.exchange([1] * 4, "testing"),
        "add_up": lambda: ranks.add_up(torch.zeros(3), "testing"),
        "announce": lambda: ranks.announce(0, "testing"),
    }
    return calls[collective]()


def errors_without_rank_1(collective: str, *, is_dead: bool) -> tuple[str, float] | None:
    # Neighbours of the dead hear of it at once; that others wait, they must not take for death.
    ranks = Comm(timeout=timedelta(seconds=7) if is_dead else TIMEOUT)
    ranks.gather(None, "meeting")
    if ranks.rank == 1:
        if is_dead:
            os._exit(3)
        time.sleep(4.5)  # alive, and elsewhere
        return None
    text, seconds = timed_error_of(call, ranks, collective)
    if text == "nothing":  # its part was done: it waits in the next one
        text, seconds = timed_error_of(ranks.gather, 1, "what follows")
    return text, seconds


@pytest.mark.parametrize(("collective", "state"), CASES)
def test_every_rank_names_the_one_that_did_not_come(collective: str, state: str) -> None:
    is_dead = state == "dead"
    allowed = [1] if is_dead else []
    found = run_ranks(errors_without_rank_1, 4, collective, is_dead=is_dead, expect_death=allowed)
    for text, seconds in found[:1] + found[2:]:
        assert "lost contact with rank 1, which ended or did not come within" in text
        assert seconds < 9


def errors_of_ranks_apart() -> str:
    ranks = Comm(timeout=TIMEOUT)
    ranks.gather(None, "meeting")
    if ranks.rank < 2:
        return error_of(ranks.receive, torch.zeros(3), 2, "gathering")
    return error_of(ranks.receive, torch.zeros(3), 0, "applied('ema')")


def test_a_rank_that_waits_elsewhere_is_named_with_the_place() -> None:
    text = run_ranks(errors_of_ranks_apart, 3)[0]
    assert "lost contact with rank 2, which waits in applied('ema')" in text


def errors_without_a_store() -> tuple[str, float] | None:
    ranks = Comm(timeout=timedelta(seconds=2))
    ranks.gather(None, "meeting")
    if ranks.rank == 1:
        time.sleep(6)
        return None
    assert ranks._roll is not None
    with mock.patch.object(ranks._roll, "_store") as store:
        store.check.side_effect = store.set.side_effect = lambda *_: time.sleep(20)
        return timed_error_of(ranks.gather, 1, "testing")


def test_a_store_that_does_not_answer_keeps_nobody() -> None:
    text, seconds = run_ranks(errors_without_a_store, 2)[0]
    assert "lost contact with other ranks, and with the job's store" in text
    assert seconds < 7


def seconds_of_collectives_without_a_store() -> list[float]:
    """One for which a rank leaves a note that hangs, and some that follow."""
    ranks = Comm()
    ranks.gather(None, "meeting")
    assert ranks._roll is not None
    with mock.patch.object(ranks._roll, "_store") as store:
        store.set.side_effect = lambda *_: time.sleep(8)
        if ranks.rank == 1:
            time.sleep(3)
        return [timed_error_of(ranks.gather, 1, "testing")[1] for _ in range(20)]


def test_without_a_store_only_one_collective_waits_for_it() -> None:
    seconds = run_ranks(seconds_of_collectives_without_a_store, 2)[0]
    assert sum(seconds[1:]) < 2


def notes_of_the_late() -> tuple[bool, bool, int]:
    """Whether there were notes while rank 1 was late, and after; and uses of the store."""
    ranks = Comm()
    ranks.gather(None, "meeting")
    assert ranks._roll is not None
    store = ranks._roll._store
    noted = False
    if ranks.rank == 1:
        until = time.monotonic() + 20
        while not noted and time.monotonic() < until:
            time.sleep(0.1)
            noted = store.check(["0"])
    ranks.gather(1, "testing")
    with mock.patch.object(ranks._roll, "_store") as unused:
        for _ in range(100):
            ranks.gather(1, "testing")
        num_uses = len(unused.mock_calls)
    return noted, store.check(["0"]), num_uses


def test_notes_are_left_by_those_who_wait_and_taken_back() -> None:
    assert run_ranks(notes_of_the_late, 2)[1] == (True, False, 0)


def thread_names() -> list[str]:
    Comm().gather(None, "meeting")
    return [thread.name for thread in threading.enumerate() if "rollcall" in thread.name]


def test_one_thread_looks_however_many_groups_there_are() -> None:
    assert run_ranks(thread_names, 2) == [["distavg-rollcall"]] * 2


# ------------------------------------------------------------- ranks that are slow, or stuck


def operate(call: str, folder: Path, seconds: float) -> tuple[str, float]:
    """An operation in which rank 1 sleeps for a while: what is raised, and after how long."""
    _, averager = trained("ddp", Uneven, timeout=TIMEOUT)
    averager.full_state_dict("ema")

    def sleep(*_: object) -> None:
        if dist.get_rank() == 1:
            time.sleep(seconds)

    def batches() -> Iterator[Tensor]:
        sleep()
        yield batch(seed=dist.get_rank())

    def swap() -> None:
        sleep()
        with averager.applied("ema"):
            sleep()

    calls: dict[str, Callable[[], object]] = {
        "save": lambda: averager.save(folder / "a", also=sleep),
        "background save": lambda: averager.save(folder / "a", also=sleep, block=False).wait(),
        "swap": swap,
        "recalibration": lambda: averager.recalibrate_batchnorm(batches(), "ema"),
    }
    return timed_error_of(calls[call])


OPERATIONS = ["save", "background save", "swap", "recalibration"]


@pytest.mark.parametrize("call", OPERATIONS)
def test_a_rank_that_is_stuck_in_an_operation_is_named(call: str, tmp_path: Path) -> None:
    found = run_ranks(operate, 3, call, tmp_path, 6.0)
    for text, seconds in (found[0], found[2]):
        assert text.startswith("RankError: ")
        assert "lost contact with rank 1, which ended or did not come within the timeout" in text
        assert seconds < 6
    assert found[1][0].startswith("RankError: ")  # it hears of it when it comes
    assert not list(tmp_path.glob("*/manifest.json"))


def operate_slowly(folder: Path) -> list[str]:
    return [operate(call, folder / call, 0.4)[0] for call in OPERATIONS]


def test_a_rank_that_is_slow_is_waited_for(tmp_path: Path) -> None:
    assert run_ranks(operate_slowly, 3, tmp_path) == [["nothing"] * len(OPERATIONS)] * 3
