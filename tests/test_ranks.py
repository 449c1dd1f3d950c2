"""The multi-rank harness: what it returns, what it reports, and what it leaves behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import RanksFailed, run_ranks, worker_pids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

# ------------------------------------------------------------------ functions that the ranks run


def rank_and_sum(start: int, *, factor: int = 1) -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() + start)]) * factor
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def process_id() -> int:
    return os.getpid()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        expected, found = 5, 7
        raise ValueError(f"expected {expected} rows, found {found}")
    dist.barrier()  # would wait for the group's timeout if nobody told it


def raise_on_all() -> None:
    raise KeyError(f"from rank {dist.get_rank()}")


def fail_an_assertion() -> None:
    rows = torch.tensor([5, 7])
    assert rows.sum() == 13


def hang_on(rank: int) -> int:
    if dist.get_rank() == rank:
        sleep_for_ever()
    return dist.get_rank()


def sleep_for_ever() -> None:
    time.sleep(1000)


def hang_in_a_collective() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        sleep_for_ever()


def die(rank: int, how: str) -> str:
    if dist.get_rank() == rank:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError as error:
        return type(error).__name__
    return "no error"


def die_and_leave_the_others_alone(rank: int) -> int:
    if dist.get_rank() == rank:
        os._exit(1)
    return dist.get_rank()


def exit_politely() -> None:
    sys.exit(3)


def start_a_child_and_raise(pid_file: Path) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    pid_file.write_text(str(child.pid))
    raise ValueError("the child is still there")


def return_something_local() -> Any:
    return lambda: 0


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2,), float(dist.get_rank())), torch.arange(6).reshape(2, 3).t()


def environment() -> tuple[str, str, str]:
    return os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]


def make_a_mess(folder: Path) -> None:
    os.environ["DISTAVG_MESS"] = "1"
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.manual_seed(dist.get_rank() + 17)
    random.seed(dist.get_rank() + 17)
    warn_once()
    dist.new_group([0])


def state() -> tuple[Any, ...]:
    return (
        "DISTAVG_MESS" in os.environ,
        Path.cwd(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.rand(1).item(),
        random.random(),
        warn_once(),
    )


def warn_once() -> int:
    shown = []
    show, warnings.showwarning = warnings.showwarning, lambda *args: shown.append(args)
    for _ in range(2):
        warnings.warn("seen once in a place", stacklevel=1)
    warnings.showwarning = show
    return len(shown)


def leave_the_group() -> None:
    dist.destroy_process_group()


def double_on_a_mesh(groups_before: int) -> tuple[bool, list[float]]:
    for _ in range(groups_before):  # so that the mesh's groups get other names
        dist.new_group([0])
    world_size = dist.get_world_size()
    shape = (2, world_size // 2) if world_size % 2 == 0 else (1, world_size)
    mesh = init_device_mesh("cpu", shape)
    sharded = distribute_tensor(torch.arange(5.0), mesh, [Shard(0), Shard(0)])
    doubled = cast(DTensor, sharded * 2)
    return doubled.device_mesh is mesh, doubled.full_tensor().tolist()


# ------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_in_rank_order(world_size: int) -> None:
    total = float(sum(range(world_size)) + 10 * world_size) * 2
    results = run_ranks(rank_and_sum, world_size, 10, factor=2)
    assert results == [(rank, world_size, total) for rank in range(world_size)]


def test_workers_are_reused() -> None:
    four = run_ranks(process_id, 4)
    assert len(set(four)) == 4
    assert os.getpid() not in four
    assert run_ranks(process_id, 4) == four
    assert run_ranks(process_id, 2) == four[:2]
    assert worker_pids()[:4] == four


def test_warm_calls_are_quick() -> None:
    run_ranks(process_id, 2)
    start = time.monotonic()
    for _ in range(5):
        run_ranks(process_id, 2)
    # 0.03 s each on an idle machine; a pool that was started anew takes seconds.
    assert time.monotonic() - start < 5 * 0.5


def test_tensors_come_back_by_value() -> None:
    (first, transposed), (second, _) = run_ranks(tensors, 2)
    ranks.close_pool()  # nothing may be left in the memory of a worker
    assert first.tolist() == [0.0, 0.0]
    assert second.tolist() == [1.0, 1.0]
    assert transposed.stride() == (1, 3)


def test_environment_is_that_of_torchrun() -> None:
    assert run_ranks(environment, 2) == [("0", "0", "2"), ("1", "1", "2")]


# ------------------------------------------------------------------------------------ failures


def failure_of(fn: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> RanksFailed:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(fn, world_size, *args, **options)
    return caught.value


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture
def pool_is_replaced() -> Iterator[None]:
    """The test's failure kills every worker there was, and the next call works."""
    before = run_ranks(process_id, 3)
    yield
    assert wait_until_gone(before) == []
    after = run_ranks(process_id, 3)
    assert set(before).isdisjoint(after)


@pytest.mark.usefixtures("pool_is_replaced")
def test_raise_on_one_rank_is_reported_and_frees_the_others() -> None:
    start = time.monotonic()
    failure = failure_of(raise_on, 3, 1)
    assert time.monotonic() - start < 10  # not the group's timeout
    text = str(failure)
    assert "rank 1: Traceback (most recent call last):" in text
    assert "ValueError: expected 5 rows, found 7" in failure.errors[1]
    assert "in raise_on" in failure.errors[1]
    assert "test_ranks.raise_on (in this order: 1" in text
    assert next(iter(failure.errors)) == 1  # the first to fail comes first
    assert not isinstance(failure, AssertionError)


@pytest.mark.usefixtures("pool_is_replaced")
def test_every_failing_rank_is_reported() -> None:
    failure = failure_of(raise_on_all, 3)
    assert sorted(failure.errors) == [0, 1, 2]
    for rank, report in failure.errors.items():
        assert f"KeyError: 'from rank {rank}'" in report


@pytest.mark.usefixtures("pool_is_replaced")
def test_failed_assertion_shows_the_values() -> None:
    failure = failure_of(fail_an_assertion, 1)
    assert "assert rows.sum() == 13" in failure.errors[0]
    assert "rows = tensor([5, 7])" in failure.errors[0]


@pytest.mark.usefixtures("pool_is_replaced")
def test_hang_is_reported_with_its_stack() -> None:
    failure = failure_of(hang_on, 3, 2, timeout=1.0)
    assert list(failure.errors) == [2]
    assert "had not returned after 1 s" in failure.errors[2]
    assert "in sleep_for_ever" in failure.errors[2]


@pytest.mark.usefixtures("pool_is_replaced")
def test_hang_in_a_collective_shows_its_stack() -> None:
    failure = failure_of(hang_in_a_collective, 2, timeout=1.0)
    assert "in barrier" in failure.errors[0]
    assert "in hang_in_a_collective" in failure.errors[0]
    assert "in sleep_for_ever" in failure.errors[1]


@pytest.mark.usefixtures("pool_is_replaced")
@pytest.mark.parametrize(
    ("how", "report"), [("exit", "died with exit code 7"), ("kill", "died, killed by SIGKILL")]
)
def test_death_is_noticed_at_once(how: str, report: str) -> None:
    start = time.monotonic()
    failure = failure_of(die, 3, 1, how)
    assert time.monotonic() - start < 10
    assert failure.errors == {1: report}


@pytest.mark.usefixtures("pool_is_replaced")
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_allowed_death_gives_the_survivors_results(how: str) -> None:
    results = run_ranks(die, 3, 1, how, expect_death={1})
    assert results[1] is None
    # A peer of the dead rank may leave the barrier's error behind before the other one sees it.
    assert [results[0], results[2]] == ["RuntimeError", "RuntimeError"]
    assert worker_pids() == []


@pytest.mark.usefixtures("pool_is_replaced")
def test_allowed_death_does_not_excuse_another() -> None:
    failure = failure_of(die_and_leave_the_others_alone, 2, 1, expect_death={0})
    assert failure.errors == {1: "died with exit code 1"}


def test_allowed_death_that_does_not_come_changes_nothing() -> None:
    before = run_ranks(process_id, 2)
    assert run_ranks(process_id, 2, expect_death={1}) == before
    assert worker_pids()[:2] == before


@pytest.mark.usefixtures("pool_is_replaced")
def test_exit_and_unpicklable_results_are_failures() -> None:
    assert "SystemExit: 3" in failure_of(exit_politely, 1).errors[0]
    assert "return_something_local.<locals>" in failure_of(return_something_local, 1).errors[0]


@pytest.mark.usefixtures("pool_is_replaced")
def test_children_of_a_killed_worker_go_with_it(tmp_path: Path) -> None:
    # On one rank the worker is gone before the pool is killed; on a hang it is not.
    pid_file = tmp_path / "pid"
    failure_of(start_a_child_and_raise, 1, pid_file)
    assert wait_until_gone([int(pid_file.read_text())]) == []


def test_function_must_be_importable() -> None:
    with pytest.raises((AttributeError, TypeError), match=r"local|lambda|pickle"):
        run_ranks(lambda: 0, 1)


# ------------------------------------------------------------------------- nothing leaks between


def test_nothing_leaks_into_the_next_call(tmp_path: Path) -> None:
    before = run_ranks(state, 2)
    run_ranks(make_a_mess, 2, tmp_path)
    assert run_ranks(state, 2) == before
    assert before[0] == before[1]
    assert before[0][-1] == 1  # a warning was shown again, once


def test_group_that_the_function_destroyed_is_no_trouble() -> None:
    run_ranks(leave_the_group, 2)
    assert run_ranks(process_id, 2) == worker_pids()[:2]


def test_meshes_of_earlier_calls_do_not_come_back() -> None:
    doubled = [0.0, 2.0, 4.0, 6.0, 8.0]
    for world_size, groups_before in [(2, 0), (4, 0), (3, 1), (4, 2), (2, 1), (1, 0), (4, 0)]:
        results = run_ranks(double_on_a_mesh, world_size, groups_before)
        assert results == [(True, doubled)] * world_size


# --------------------------------------------------------------------- the end of a test session

SESSION = """
import os, time
from pathlib import Path
import pytest
from ranks import run_ranks, worker_pids
from test_ranks import process_id, sleep_for_ever

@pytest.mark.parametrize("case", range(4))
def test_it(case):
    pids = run_ranks(process_id, 2)
    parents = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] for pid in pids]
    Path(f"pids-{os.getpid()}-{case}").write_text(" ".join(map(str, [*pids, *parents])))

def test_last():
    if os.environ.get("DISTAVG_SLEEP"):
        pids = worker_pids() or run_ranks(process_id, 2)
        Path("sleeping").write_text(" ".join(map(str, pids)))
        run_ranks(sleep_for_ever, 2)
"""


def start_session(folder: Path, *options: str, **environ: str) -> subprocess.Popen[str]:
    tests = Path(__file__).parent
    (folder / "test_session.py").write_text(SESSION)
    (folder / "conftest.py").write_text((tests / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = gpu\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    path = os.pathsep.join(filter(None, [str(tests), os.environ.get("PYTHONPATH")]))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**kept, "PYTHONPATH": path, **environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A job that a shell started with & ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def recorded_pids(folder: Path) -> list[int]:
    texts = [file.read_text() for file in [*folder.glob("pids-*"), *folder.glob("sleeping")]]
    return [int(pid) for text in texts for pid in text.split()]


def test_session_ends_without_a_process_or_warning(tmp_path: Path) -> None:
    session = start_session(tmp_path, "-n", "2")  # each of its workers is a session alone
    output, _ = session.communicate(timeout=100)
    assert session.returncode == 0, output
    assert "5 passed" in output
    assert "arning" not in output
    pids = recorded_pids(tmp_path)
    assert len(pids) == 16
    assert wait_until_gone(pids) == []  # workers and the fork servers, their parents


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_interrupted_session_leaves_no_process(tmp_path: Path, how: str) -> None:
    session = start_session(tmp_path, DISTAVG_SLEEP="1")
    deadline = time.monotonic() + 60
    while not (tmp_path / "sleeping").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # until the ranks sleep
    if how == "interrupt":
        os.killpg(session.pid, signal.SIGINT)  # as the terminal does
    else:
        os.kill(session.pid, signal.SIGKILL)
    output, _ = session.communicate(timeout=30)
    assert session.returncode == (2 if how == "interrupt" else -signal.SIGKILL), output
    if how == "interrupt":
        assert "KeyboardInterrupt" in output
        assert "arning" not in output
    assert wait_until_gone(recorded_pids(tmp_path)) == []
