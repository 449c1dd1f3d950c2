"""Collectives, what they do on one process, and errors that every rank raises."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import error_of, same, timed_error_of, trained
from models import Uneven
from ranks import run_ranks
from torch import Tensor

from distavg import CheckpointCorrupt, StateError, comm, replicas
from distavg.comm import Comm
from distavg.replicas import ReplicaGroup


def test_one_process_communicates_nothing() -> None:
    alone = Comm()
    assert (alone.rank, alone.size, alone.is_parallel) == (0, 1, False)
    assert alone.gather("a", "x") == ["a"]
    assert alone.gather_to_first("a", "x") == ["a"]
    assert alone.exchange(["a"], "x") == ["a"]
    assert alone.broadcast("a", "x") == "a"
    assert alone.announce(2, "x") == {}
    with alone.together("x") as vote:
        vote.answer = "a"
    assert vote.answers == ["a"]
    with pytest.raises(ZeroDivisionError), alone.together("x"):
        _ = 1 / 0


def values_of_collectives() -> tuple[object, ...]:
    ranks = Comm()
    mine = {"rank": ranks.rank}
    box = torch.full((3,), float(ranks.rank))
    ranks.broadcast_tensor(box, "x")
    return (
        ranks.gather(mine, "x"),
        ranks.gather_to_first(mine, "x"),
        ranks.broadcast(mine, "x"),
        ranks.exchange([{**mine, "for": rank} for rank in range(ranks.size)], "x"),
        box.tolist(),
        ranks.announce(0, "x"),
    )


def test_collectives_carry_every_ranks_value() -> None:
    everything = [{"rank": rank} for rank in range(3)]
    for rank, found in enumerate(run_ranks(values_of_collectives, 3)):
        to_first = everything if rank == 0 else None
        exchanged = [{**each, "for": rank} for each in everything]
        assert found == (everything, to_first, everything[0], exchanged, [0.0] * 3, {})


def values_of_sizes() -> list[bool]:
    """Whether values whose pickles do and do not fit in one record all arrive."""
    ranks = Comm()
    arrived = []
    for size in (0, 400, 470, 480, 485, 490, 495, 500, 505, 510, 600, 100_000):
        expected = [b"x" * (size if rank else 3) for rank in range(ranks.size)]
        arrived.append(ranks.gather(expected[ranks.rank], "x") == expected)
        with ranks.together("x") as vote:
            vote.answer = expected[ranks.rank]
        arrived.append(vote.answers == expected)
    return arrived


def test_values_of_any_size_arrive() -> None:
    assert run_ranks(values_of_sizes, 2) == [[True] * 24] * 2


def value_between(sender: int, receiver: int) -> bytes:
    """Nothing from or to some, and of very different lengths."""
    size = (0, 1, 300_000, 70, 0)[(3 * sender + receiver) % 5] * (sender != 1) * (receiver != 3)
    return bytes([16 * sender + receiver]) * size


def values_exchanged() -> list[bool]:
    """Whether values of every size arrive where they belong, twice, and then nothing but None."""
    ranks = Comm()
    everyone = range(ranks.size)
    arrived = []
    for _ in range(2):
        found = ranks.exchange([value_between(ranks.rank, other) for other in everyone], "x")
        arrived.append(found == [value_between(other, ranks.rank) for other in everyone])
    arrived.append(ranks.exchange([None] * ranks.size, "x") == [None] * ranks.size)
    return arrived


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_values_of_any_size_are_exchanged(world_size: int) -> None:
    assert run_ranks(values_exchanged, world_size) == [[True] * 3] * world_size


TENSORS: list[Callable[[], Tensor]] = [
    lambda: torch.arange(100, dtype=torch.float32),
    lambda: torch.tensor(3.5, dtype=torch.float64),
    lambda: torch.arange(33, dtype=torch.bfloat16).view(3, 11),
    lambda: torch.tensor([True, False, True]),
    lambda: torch.empty(0, 4),
]


def tensors_that_arrive() -> list[bool]:
    ranks = Comm()
    arrived = []
    with mock.patch.object(comm, "MESSAGE_BYTES", 48):  # so that small tensors take several
        for make in TENSORS:
            expected = make()
            if ranks.rank == 0:
                ranks.send(expected, 1, "x")
                ranks.broadcast_tensor(expected, "x")
            else:
                received, spread = torch.zeros_like(expected), torch.zeros_like(expected)
                ranks.receive(received, 0, "x")
                ranks.broadcast_tensor(spread, "x")
                arrived += [same(received, expected), same(spread, expected)]
    return arrived


def test_tensors_travel_in_messages_of_any_size_and_dtype() -> None:
    assert run_ranks(tensors_that_arrive, 2) == [[], [True] * 2 * len(TENSORS)]


def shared_pieces(message_bytes: int) -> list[str]:
    """What differs after a rank has given the others its pieces: large, small and strided."""
    ranks = Comm()
    group = ReplicaGroup(ranks, ranks.ranks, "cpu", None)

    def pieces(owner: int, value: float) -> list[Tensor]:
        strided = torch.full((6, 4), value + owner).t()
        return [
            torch.full((50,), value + owner),
            torch.full((), value + owner),
            strided,
            strided[1:3],
            torch.full((3, 3), value + owner, dtype=torch.float64),
            torch.full((5,), int(value + owner), dtype=torch.int64),
            torch.empty(0),
        ]

    mine = [pieces(owner, 10.0 if owner == ranks.rank else 90.0) for owner in range(ranks.size)]
    with mock.patch.object(replicas, "MESSAGE_BYTES", message_bytes):
        group.share(mine, "x")
    return [
        f"{index} of rank {owner}"
        for owner, tensors in enumerate(mine)
        for index, (tensor, expected) in enumerate(zip(tensors, pieces(owner, 10.0), strict=True))
        if not same(tensor, expected)
    ]


@pytest.mark.parametrize("message_bytes", [8, 64, 2**23])
def test_every_replica_gets_the_pieces_of_every_owner(message_bytes: int) -> None:
    assert run_ranks(shared_pieces, 3, message_bytes) == [[], [], []]


def errors_together(failing: list[int], kind: str) -> str:
    ranks = Comm()

    def body() -> None:
        with ranks.together("testing"):
            if ranks.rank in failing:
                if kind == "own":
                    raise CheckpointCorrupt("a torn file")
                if kind == "differing":
                    raise StateError(f"state of {ranks.rank}")
                raise FileNotFoundError("no file")

    text = error_of(body)
    assert ranks.gather(ranks.rank, "and on") == list(range(ranks.size))  # still in step
    return text


def test_an_error_of_ours_is_raised_everywhere_with_its_type() -> None:
    found = run_ranks(errors_together, 3, [1], "own")
    assert found[1] == "CheckpointCorrupt: a torn file"
    assert found[0] == found[2] == "CheckpointCorrupt: testing failed. rank 1: a torn file"


def test_an_error_of_another_kind_is_a_rank_error_on_the_others() -> None:
    found = run_ranks(errors_together, 3, [0, 2], "other")
    assert found[0] == found[2] == "FileNotFoundError: no file"
    assert found[1] == (
        "RankError: testing failed. rank 0: FileNotFoundError: no file\n"
        "rank 2: FileNotFoundError: no file"
    )


def test_errors_that_differ_are_all_told_to_all() -> None:
    expected = "StateError: testing failed. rank 0: state of 0\nrank 1: state of 1"
    assert run_ranks(errors_together, 3, [0, 1], "differing") == [expected] * 3


def test_nothing_is_raised_where_nothing_failed() -> None:
    assert run_ranks(errors_together, 2, [], "own") == ["nothing"] * 2


def late_announcement() -> tuple[dict[int, int], float]:
    """What each rank hears, and how long it waited, when only rank 1 has a code and is early."""
    ranks = Comm()
    if ranks.rank == 0:
        time.sleep(1)
    start = time.monotonic()
    heard = ranks.announce(2 if ranks.rank == 1 else 0, "x")
    seconds = time.monotonic() - start
    assert ranks.gather(0, "and on") == [0, 0]
    return heard, seconds


def test_a_rank_that_announces_a_failure_does_not_wait() -> None:
    (heard, _), (own, waited) = run_ranks(late_announcement, 2)
    assert heard == {1: 2}
    assert own == {}
    assert waited < 0.5


def wait_for_one_that_never_comes(collective: str) -> tuple[str, float] | None:
    ranks = Comm(timeout=timedelta(seconds=2))
    if ranks.rank == 1:
        time.sleep(4)  # alive, and elsewhere
        return None
    calls = {
        "gather": lambda: ranks.gather(1, "testing"),
        "gather_to_first": lambda: ranks.gather_to_first(1, "testing"),
        "exchange": lambda: ranks.exchange([1, 2], "testing"),
        "announce": lambda: ranks.announce(0, "testing"),
        "receive": lambda: ranks.receive(torch.zeros(3), 1, "testing"),
    }
    return timed_error_of(calls[collective])


@pytest.mark.parametrize(
    "collective", ["gather", "gather_to_first", "exchange", "announce", "receive"]
)
def test_a_rank_that_never_comes_ends_the_wait_after_the_timeout(collective: str) -> None:
    found = run_ranks(wait_for_one_that_never_comes, 2, collective)[0]
    assert found is not None
    text, seconds = found
    assert text.startswith("RankError: testing: lost contact with rank 1")
    assert "Averager(timeout=" in text
    assert 0.9 < seconds < 4


def vote_with_the_dead() -> tuple[str, float]:
    ranks = Comm(timeout=timedelta(seconds=20))
    ranks.gather(None, "meeting")  # the others have made their groups, too
    if ranks.rank == 1:
        os._exit(3)

    def body() -> None:
        with ranks.together("testing"):
            pass

    return timed_error_of(body)


def test_a_dead_rank_ends_a_vote_at_once() -> None:
    found = run_ranks(vote_with_the_dead, 3, expect_death=[1])
    for text, seconds in (found[0], found[2]):
        assert text.startswith("RankError: testing: lost contact")
        assert seconds < 10


def two_of_three() -> tuple[int, int, list[int]] | None:
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    ranks = Comm(group)
    return ranks.rank, ranks.size, ranks.gather(dist.get_rank(), "x")


def test_a_group_of_some_ranks_counts_within_itself() -> None:
    assert run_ranks(two_of_three, 3) == [(0, 2, [0, 2]), None, (1, 2, [0, 2])]


def two_jobs(folder: str) -> None:
    """At one port, one after the other; whether each meets the store of one before is printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    for _ in range(2):
        job(address, f"{folder}/a")
        gc.collect()
        dist.destroy_process_group()


def job(address: str, path: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    print("known" if store.check(["known"]) else "new")
    store.set("known", "")
    _, averager = trained("plain", Uneven)
    averager.save(path, overwrite=True, block=False).wait()


def test_nothing_outlives_the_job_but_what_the_user_holds(tmp_path: Path) -> None:
    """In a process of its own: others may hold what a test before has left."""
    command = f"import test_comm; test_comm.two_jobs({str(tmp_path)!r})"
    printed = subprocess.run(
        [sys.executable, "-c", command],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert printed == "new\nnew\n"
