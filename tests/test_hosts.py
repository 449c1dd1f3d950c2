"""Jobs over several hosts; hosts that are cut off, and hosts that share no folder. All for real."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import RULES, cloned, differences, error_of, storages, torch_average, trained
from hosts import Hosts, hold, results_in, seconds_since_the_cut, why_not
from models import Block, Uneven, backward, batch, build, whole_weights
from torch import Tensor, nn

import distavg
from distavg import Averager, swap
from distavg.checkpoint import save
from distavg.comm import Comm

TIMEOUT_SECONDS = 6.0
TIMEOUT = timedelta(seconds=TIMEOUT_SECONDS)
LIMIT_SECONDS = TIMEOUT_SECONDS + 3.0  # on a busy machine
STEPS = range(3)
NAMES = [name for name, p in Uneven().named_parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(4) as hosts:
        yield hosts


# ---------------------------------------------------------------------------------- training


def train(root: str, *layouts: str) -> list[str]:
    """What differs from one process, in training with averages that are swapped in and saved."""
    dist.init_process_group("gloo")
    found = []
    for layout in layouts:
        model, averager = trained(layout, Uneven, STEPS)
        live = cloned(storages(model))
        for rule in RULES:
            expected = torch_average(Uneven, rule, STEPS)
            with averager.applied(rule):
                found += unlike(whole_weights(model), expected, f"{layout}: applied {rule}")
            whole = averager.full_state_dict(rule, all_ranks=True)
            found += unlike(whole, expected, f"{layout}: whole {rule}")
        found += [f"{layout}: live {name}" for name in differences(storages(model), live)]
        averager.save(f"{root}/{layout}")
    dist.destroy_process_group()
    return found


def load(*paths: str) -> list[str]:
    """What differs from one process, in checkpoints that are loaded."""
    dist.init_process_group("gloo")
    averager = Averager(build("fsdp2", Uneven, seed=99), RULES)
    found = []
    for path in paths:
        averager.load(path)
        for rule in RULES:
            whole = averager.full_state_dict(rule, all_ranks=True)
            found += unlike(whole, torch_average(Uneven, rule, STEPS), f"{path}: {rule}")
    dist.destroy_process_group()
    return found


def unlike(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> list[str]:
    """The averaged tensors that differ."""
    differing = differences({n: found[n] for n in NAMES}, {n: expected[n] for n in NAMES})
    return [f"{where}: {name}" for name in differing]


def test_averages_over_hosts_have_the_bits_of_one_process(hosts: Hosts, tmp_path: Path) -> None:
    assert hosts.run(train, [0, 1, 2, 3], str(tmp_path), "fsdp2").results() == [[]] * 4
    assert torchrun(hosts, tmp_path, train, str(tmp_path), "hsdp", "ddp") == [[]] * 4
    saved = [str(tmp_path / layout) for layout in ("fsdp2", "hsdp", "ddp")]
    assert hosts.run(load, [3, 1, 0], *saved).results() == [[]] * 3


def torchrun(hosts: Hosts, folder: Path, fn: Callable[..., Any], *args: str) -> list[Any]:
    """Run a function on two hosts of two ranks each, as torchrun starts them."""
    script = str(Path(__file__).with_name("hosts.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    command += [f"--master-addr={hosts.address(0)}", "--master-port=29400"]
    call = [script, str(folder), fn.__module__, fn.__name__, *args]
    agents = [hosts.start(node, [*command, f"--node-rank={node}", *call]) for node in range(2)]
    assert [agent.wait(60) for agent in agents] == [0, 0]
    return results_in(folder, 4)


# ------------------------------------------------------------------------------- hosts cut off


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank heard when a host was cut off.

    Attributes:
        error: What its call raised.
        after: When, in seconds since the cut.
        next_error: What the save raised that it tried afterwards, if it did.
        ended: When its function returned, and only its interpreter's end was left.
    """

    error: str
    after: float
    next_error: str | None
    ended: float


def _train(model: nn.Module, averager: Averager, path: str, *, is_doomed: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    averager.attach(optimizer)
    for step in range(3):
        if step == 2 and is_doomed:
            (block,) = (module for module in model.modules() if isinstance(module, Block))
            block.register_forward_pre_hook(lambda *_: hold())
        backward(model, seed=step)
        optimizer.step()
        optimizer.zero_grad()


def _enter(model: nn.Module, averager: Averager, path: str, *, is_doomed: bool) -> None:
    with _holding(swap, "_share_pieces", is_doomed), averager.applied("ema"):
        raise AssertionError("it came in")


def _leave(model: nn.Module, averager: Averager, path: str, *, is_doomed: bool) -> None:
    with ExitStack() as stack, averager.applied("ema"):
        stack.enter_context(_holding(swap, "_share_pieces", is_doomed))


def _raise(model: nn.Module, averager: Averager, path: str, *, is_doomed: bool) -> None:
    with averager.applied("ema"):
        if is_doomed:
            hold()
            raise RuntimeError("in the body")


def _save(model: nn.Module, averager: Averager, path: str, *, is_doomed: bool) -> None:
    averager.save(path, also=lambda folder: hold() if is_doomed else None)


def _save_in_background(
    model: nn.Module, averager: Averager, path: str, *, is_doomed: bool
) -> None:
    with _holding(save, "_write", is_doomed):
        averager.save(path, block=False).wait()


def _make_a_group(model: nn.Module, averager: Averager, path: str, *, is_doomed: bool) -> None:
    with _holding(Comm, "for_a_thread", is_doomed):
        averager.save(path, block=False).wait()


def _recalibrate(model: nn.Module, averager: Averager, path: str, *, is_doomed: bool) -> None:
    def batches() -> Iterator[Tensor]:
        yield batch(0)
        if is_doomed:
            hold()
        yield batch(1)

    averager.recalibrate_batchnorm(batches(), "ema")


def _holding(target: object, name: str, is_doomed: bool) -> AbstractContextManager[object]:
    """Where the host is doomed, a function of the library waits for the cut when it is called."""
    original = getattr(target, name)

    def held(*args: Any, **kwargs: Any) -> Any:
        hold()
        return original(*args, **kwargs)

    return mock.patch.object(target, name, held) if is_doomed else nullcontext()


def work_until_cut(call: str, layout: str, root: str, doomed: int, saves_again: bool) -> Report:
    """Commit a checkpoint, then make a call in which a rank's host is cut off."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    model, averager = trained(layout, Uneven, STEPS, timeout=TIMEOUT)
    averager.save(f"{root}/good")
    is_doomed = dist.get_rank() == doomed
    error = error_of(globals()[call], model, averager, f"{root}/b", is_doomed=is_doomed)
    after = seconds_since_the_cut()
    next_error = error_of(averager.save, f"{root}/c") if saves_again else None
    return Report(error, after, next_error, seconds_since_the_cut())


def cut_off(
    hosts: Hosts, root: Path, call: str, layout: str, doomed: int, *, saves_again: bool = False
) -> list[Report]:
    """What each of three ranks on as many hosts hears when one host is cut off in a call.

    Whatever the call: each rank hears of it and ends in time, and those that are left can load.
    """
    everyone = [0, 1, 2]
    arguments = call, layout, str(root), doomed, saves_again
    job = hosts.run(work_until_cut, everyone, *arguments, timeout=4 * LIMIT_SECONDS)
    job.wait_until_held()
    try:
        job.cut(doomed)
        ended = job.wait()
        for rank, each in enumerate(ended):
            print(f"rank {rank}: {each.result or each.output}")
            print(f"rank {rank} ended with {each.code} {each.at - job.cut_at:.1f} s after the cut")
        assert [each.code for each in ended] == [0, 0, 0]
        for each in ended:
            assert each.result.error != "nothing"
            assert each.result.next_error != "nothing"
            assert each.result.after < LIMIT_SECONDS
            assert each.result.ended - each.result.after < LIMIT_SECONDS
            assert each.at - job.cut_at - each.result.ended < LIMIT_SECONDS
        left = [host for host in everyone if host != doomed]
        assert hosts.run(load, left, str(root / "good")).results() == [[], []]
        assert distavg.latest(root) == root / "good"
    finally:
        hosts.plug(doomed)
    return [each.result for each in ended]


def assert_lost(error: str, doing: str, rank: int, doomed: int) -> None:
    lost = [each for each in range(3) if (each == doomed) != (rank == doomed)]
    named = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {lost[0]}, {lost[1]}"
    if 0 in lost:  # the host of the store
        named = "other ranks, and with the job's store"
    assert error.startswith(f"RankError: {doing}: lost contact with {named}"), error


@pytest.mark.parametrize(("layout", "doomed"), [("fsdp2", 2), ("ddp", 0)])
def test_a_host_cut_off_in_a_training_step(
    hosts: Hosts, tmp_path: Path, layout: str, doomed: int
) -> None:
    reports = cut_off(hosts, tmp_path, "_train", layout, doomed, saves_again=layout == "fsdp2")
    for rank, report in enumerate(reports):
        assert "Timed out waiting" in report.error  # torch's own error, from its own collective
        if report.next_error is not None:
            assert_lost(report.next_error, f"saving to {tmp_path / 'c'}", rank, doomed)


@pytest.mark.parametrize(("call", "doomed"), [("_enter", 0), ("_leave", 2)])
def test_a_host_cut_off_while_replicas_exchange_an_average(
    hosts: Hosts, tmp_path: Path, call: str, doomed: int
) -> None:
    reports = cut_off(hosts, tmp_path, call, "ddp", doomed, saves_again=True)
    for rank, report in enumerate(reports):
        assert_lost(report.error, "applied('ema')", rank, doomed)
        # The weights are a mixture: nothing may be averaged or saved from now on.
        assert str(report.next_error).startswith("StateError: applied('ema') lost a rank")


def test_a_body_that_raises_on_a_host_that_is_cut_off(hosts: Hosts, tmp_path: Path) -> None:
    reports = cut_off(hosts, tmp_path, "_raise", "fsdp2", 2)
    assert reports[2].error == "RuntimeError: in the body"
    assert reports[2].after < TIMEOUT_SECONDS  # it does not wait for the others
    for rank in (0, 1):
        assert_lost(reports[rank].error, "applied('ema')", rank, 2)


@pytest.mark.parametrize(
    ("call", "layout", "doomed"), [("_save", "ddp", 0), ("_save_in_background", "fsdp2", 2)]
)
def test_a_host_cut_off_in_a_save(
    hosts: Hosts, tmp_path: Path, call: str, layout: str, doomed: int
) -> None:
    for rank, report in enumerate(cut_off(hosts, tmp_path, call, layout, doomed)):
        assert_lost(report.error, f"saving to {tmp_path / 'b'}", rank, doomed)
    assert list(tmp_path.iterdir()) == [tmp_path / "good"]  # rank 0 can still reach the folder


def test_the_host_of_the_store_cut_off_while_a_group_is_made(hosts: Hosts, tmp_path: Path) -> None:
    for rank, report in enumerate(cut_off(hosts, tmp_path, "_make_a_group", "fsdp2", 0)):
        assert_lost(report.error, "making a group of the ranks", rank, 0)


@pytest.mark.parametrize(("layout", "doomed"), [("ddp", 2), ("fsdp2", 0)])
def test_a_host_cut_off_while_batchnorm_is_recalibrated(
    hosts: Hosts, tmp_path: Path, layout: str, doomed: int
) -> None:
    for rank, report in enumerate(cut_off(hosts, tmp_path, "_recalibrate", layout, doomed)):
        assert_lost(report.error, "recalibrating BatchNorm", rank, doomed)


# ----------------------------------------------------------------- hosts that share no folder


def save_alone(path: str) -> None:
    dist.init_process_group("gloo")
    trained("fsdp2", Uneven, STEPS)[1].save(path, also=lambda folder: (folder / "x").touch())
    dist.destroy_process_group()


def first_save(path: str, how: str) -> tuple[str, bool, list[str]]:
    """What a rank hears; whether `also` was called; what is new or changed in its folder."""
    dist.init_process_group("gloo")
    _, averager = trained("fsdp2", Uneven, STEPS)
    called = []

    def also(folder: Path) -> None:
        called.append(folder)
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"rank-{dist.get_rank()}").touch()

    before = contents(Path(path).parent)
    options: dict[str, Any] = {"block": how != "in the background"}
    if how == "with also":
        options["also"] = also
    error = error_of(lambda: averager.save(path, **options).wait())
    dist.barrier()
    after = contents(Path(path).parent)
    dist.destroy_process_group()
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    return error, bool(called), changed


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("before", "how"),
    [
        ("nothing", "at once"),
        ("nothing", "in the background"),
        ("nothing", "with also"),
        ("an older checkpoint", "at once"),
        ("an older checkpoint", "in the background"),
        ("an older checkpoint", "with also"),
    ],
)
def test_hosts_that_share_no_folder(hosts: Hosts, tmp_path: Path, before: str, how: str) -> None:
    folder = tmp_path / "unshared"
    folder.mkdir()
    hosts.private(1, folder)
    if before == "an older checkpoint":  # of the same names, on one host only
        hosts.run(save_alone, [1], str(folder / "a")).results()
    found = hosts.run(first_save, [0, 1], str(folder / "a"), how).results()
    for error, _, changed in found:
        print(error)
        assert error.startswith("CheckpointError: ")
        assert "/unshared/a on the machine 'host-1' is not the folder" in error
        assert "save to a file system that all ranks share" in error
        assert changed == []
    assert found[1][1] is False  # `also` has no folder to write to there


# ------------------------------------------------------------------------------- the harness


def address() -> tuple[str, int]:
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    dist.destroy_process_group()
    return os.uname().nodename, int(total)


def test_ranks_run_where_they_are_placed(hosts: Hosts) -> None:
    assert hosts.run(address, [2, 0, 2]).results() == [("host-2", 3), ("host-0", 3), ("host-2", 3)]


def hang() -> None:
    time.sleep(60)


def test_a_rank_that_hangs_shows_its_stack(hosts: Hosts) -> None:
    (ended,) = hosts.run(hang, [0], timeout=0.5).wait()
    assert ended.code == 1
    assert "in hang" in ended.output


def exit_late() -> float:
    import atexit

    atexit.register(time.sleep, 1.0)
    return math.pi


def test_a_rank_has_ended_when_its_interpreter_has(hosts: Hosts) -> None:
    begin = time.monotonic()
    (ended,) = hosts.run(exit_late, [0]).wait()
    assert ended.result == math.pi
    assert ended.at - begin > 1.0


def test_hosts_end_with_what_runs_on_them() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(1, serving=False) as hosts:
        process = hosts.start(0, ["sleep", "60"])
        child = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 10
        while not (pids := child.read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not Path(f"/proc/{pids[0]}").exists()
