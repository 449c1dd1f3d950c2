"""Run a function on several real gloo ranks on the CPU, and hand back what each rank returned.

The ranks are processes of a pool that lives as long as the test session (one pool for each
pytest-xdist worker). They are forked from a server that has torch loaded, so that the first call
costs a few seconds and every further one some hundredths of a second. One call goes like this:

1. the parent sends the function, by reference, with its arguments to the first N workers; each of
   them sets RANK, WORLD_SIZE and LOCAL_RANK, seeds torch with 0 and joins the default process group
   over a file that only this call uses;
2. once all have joined, each runs the function and sends its pickled result. No rank can die while
   another one still joins, which would be an error outside of the function;
3. once all have returned, they destroy the group and put back what a test may have changed. A rank
   that is done never closes a connection that a slower one still needs.

After a failure of any kind (an exception, a death, a rank that hangs) the whole pool is killed, and
the next call starts a fresh one. `RanksFailed` shows every rank's traceback under its number.

What a worker keeps between calls: imported modules and what a function monkeypatched for good.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import random
import reprlib
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
import torch.multiprocessing as mp

GROUP_TIMEOUT_SECONDS = 30.0
# How long ranks may go on once another one has failed. A peer of a dead rank sees a closed
# connection within milliseconds; what takes longer waits for something that will not come.
GRACE_SECONDS = 3.0
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.debug",
    "torch.distributed.checkpoint",
    "hypothesis",
    "pytest",  # test modules import it, and every worker imports a test module
    "distavg",
)


class RanksFailed(Exception):
    """At least one rank raised, died or hung. `errors` maps each such rank to its report."""

    def __init__(self, where: str, world_size: int, errors: dict[int, str]) -> None:
        self.errors = errors
        order = ", ".join(map(str, errors))
        head = f"{len(errors)} of {world_size} ranks failed in {where} (in this order: {order})"
        super().__init__("\n\n".join([head, *(f"rank {r}: {text}" for r, text in errors.items())]))


_GO_ON = b"all ranks have come this far"


@dataclass(frozen=True, slots=True)
class _Call:
    """What one worker is asked to do; `payload` is the pickled (fn, args, kwargs)."""

    rank: int
    world_size: int
    rendezvous: str
    sys_path: list[str]
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Returned:
    """A phase is over; `payload` is what the function returned, pickled."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class _Failed:
    """The rank raised or died at `at_seconds` of the machine's monotonic clock."""

    report: str
    at_seconds: float
    died: bool = False


@dataclass(frozen=True, slots=True)
class _Worker:
    """One process of the pool, the parent's end of its pipe, and where it dumps its stack."""

    process: ForkServerProcess
    pipe: connection.Connection
    stack_file: Path


# ---------------------------------------------------------------------------- the parent's side

_workers: list[_Worker] = []
_folders: list[Path] = []  # the pool's temporary folder, when there is a pool
_calls = 0


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    expect_death: Collection[int] = (),
    **kwargs: Any,
) -> list[Any]:
    """Run `fn(*args, **kwargs)` on `world_size` gloo ranks; return their results in rank order.

    Args:
        fn: A function of a module's top level; the workers import it by name.
        world_size: How many ranks there are.
        args: Its arguments, the same on every rank, pickled.
        timeout: Seconds that the function may take; after them a rank counts as hanging.
        expect_death: Ranks that are allowed to die. The result of one that did is None, those of
            the others are returned as usual, and the pool is thrown away.
        kwargs: Its keyword arguments.

    Raises:
        RanksFailed: A rank raised, died without leave, or had not returned in time.
    """
    global _calls
    payload = pickle.dumps((fn, args, kwargs))
    where = f"{fn.__module__}.{fn.__qualname__}"
    patience = max(timeout, GROUP_TIMEOUT_SECONDS)
    try:
        _grow(world_size)
        _calls += 1
        rendezvous = _folders[0] / f"rendezvous-{_calls}"
        calls = {
            rank: pickle.dumps(_Call(rank, world_size, str(rendezvous), list(sys.path), payload))
            for rank in range(world_size)
        }
        _phase(f"joining the group of {where}", calls, patience)
        replies = _phase(where, dict.fromkeys(calls, _GO_ON), timeout, expect_death)
        _phase(f"cleaning up after {where}", dict.fromkeys(replies, _GO_ON), patience)
        rendezvous.unlink(missing_ok=True)
        if len(replies) < world_size:
            _kill_pool()
    except BaseException:  # a KeyboardInterrupt and pytest-timeout's exception, too
        _kill_pool()
        raise
    return [
        pickle.loads(replies[rank].payload) if rank in replies else None
        for rank in range(world_size)
    ]


def worker_pids() -> list[int]:
    """The process ids of the pool as it is now, in rank order."""
    return [worker.process.pid or 0 for worker in _workers]


def close_pool() -> None:
    """End the pool: idle workers leave by themselves, others are killed. Safe to call again."""
    for worker in _workers:
        worker.pipe.close()
    deadline = time.monotonic() + 2.0
    for worker in _workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
    _kill_pool()


atexit.register(close_pool)  # where no test session closes it: in a script, in an interpreter


def _grow(size: int) -> None:
    context = mp.get_context("forkserver")
    if not _folders:
        context.set_forkserver_preload([name for name in PRELOAD if _importable(name)])
        _folders.append(Path(tempfile.mkdtemp(prefix="distavg-ranks-")))
    while len(_workers) < size:
        ours, theirs = context.Pipe()
        stack_file = _folders[0] / f"stack-{len(_workers)}"
        process = context.Process(
            target=_serve, args=(theirs, stack_file), name=f"rank-{len(_workers)}"
        )
        process.start()
        theirs.close()
        _workers.append(_Worker(process, ours, stack_file))


def _importable(name: str) -> bool:
    # The server dies of a module that raises anything but ImportError while it loads.
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def _phase(
    where: str, messages: dict[int, bytes], timeout: float, expect_death: Collection[int] = ()
) -> dict[int, _Returned]:
    """Send each rank its message and wait for what it returns; ranks that may die can lack."""
    for rank, message in messages.items():
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: seen below
            _workers[rank].pipe.send_bytes(message)
    returned, failures = _collect(messages, timeout, expect_death)
    if failures:
        in_order = sorted(failures.items(), key=lambda item: item[1].at_seconds)
        raise RanksFailed(where, len(messages), {r: failure.report for r, failure in in_order})
    return returned


def _collect(
    ranks: Collection[int], timeout: float, expect_death: Collection[int]
) -> tuple[dict[int, _Returned], dict[int, _Failed]]:
    """One reply of each rank; what has not come in time is a failure as well."""
    returned: dict[int, _Returned] = {}
    failures: dict[int, _Failed] = {}
    waiting = list(ranks)
    deadline = time.monotonic() + timeout
    reason = f"had not returned after {timeout:g} s"
    while waiting:
        signs = [sign for rank in waiting for sign in _signs(rank)]
        ready = connection.wait(signs, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [r for r in waiting if any(sign in ready for sign in _signs(r))]:
            waiting.remove(rank)
            reply = _read(_workers[rank])
            if isinstance(reply, _Returned):
                returned[rank] = reply
            elif not (reply.died and rank in expect_death):
                failures[rank] = reply
                if deadline > time.monotonic() + GRACE_SECONDS:
                    deadline = time.monotonic() + GRACE_SECONDS
                    reason = f"had not returned {GRACE_SECONDS:g} s after rank {rank} failed"
    for rank, stack in _python_stacks(waiting).items():
        failures[rank] = _Failed(f"{reason}; its Python stack:\n{stack}", time.monotonic())
    return returned, failures


def _signs(rank: int) -> list[connection.Connection | int]:
    """What becomes ready when the rank answers, and when it ends."""
    return [_workers[rank].pipe, _workers[rank].process.sentinel]


def _read(worker: _Worker) -> _Returned | _Failed:
    try:
        if worker.pipe.poll():  # the last words of a dead process are still in the pipe
            reply: _Returned | _Failed = pickle.loads(worker.pipe.recv_bytes())
            return reply
    except (EOFError, OSError):
        pass
    worker.process.join(GRACE_SECONDS)
    code = worker.process.exitcode
    if code is None:
        how = "closed its pipe and goes on running"
    elif code < 0:
        how = f"died, killed by {signal.Signals(-code).name}"
    else:
        how = f"died with exit code {code}"
    return _Failed(how, time.monotonic(), died=True)


def _python_stacks(ranks: Collection[int]) -> dict[int, str]:
    """Each rank's Python stack, written by its faulthandler even while it hangs in C++."""
    for rank in ranks:
        pid = _workers[rank].process.pid
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, signal.SIGUSR1)
    if ranks:
        time.sleep(0.3)
    return {rank: _workers[rank].stack_file.read_text() or "(none came)" for rank in ranks}


def _kill_pool() -> None:
    for worker in _workers:
        if worker.process.is_alive():
            # A worker leads a process group, so that what it started goes with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid or 0, signal.SIGKILL)
            worker.process.kill()  # one that is too young to lead its group
    for worker in _workers:
        worker.process.join()
        worker.process.close()
        worker.pipe.close()
    _workers.clear()
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


# ---------------------------------------------------------------------------- the worker's side


def _serve(pipe: connection.Connection, stack_file: Path) -> None:
    """A worker's whole life: calls, until the parent closes the pipe."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    stacks = stack_file.open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    threading.Thread(target=_die_with_parent, args=(stack_file.parent,), daemon=True).start()
    torch.set_num_threads(1)
    # The loopback device: no look-up of the machine's name, which fails in some sandboxes.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    gc.freeze()  # what was imported is not garbage; a collection takes 150 ms without this
    while True:
        try:
            call: _Call = pickle.loads(pipe.recv_bytes())
            with _restored_state():
                _run(call, pipe)
        except (EOFError, ConnectionResetError):
            return
        pipe.send_bytes(pickle.dumps(_Returned(b"")))


def _run(call: _Call, pipe: connection.Connection) -> None:
    """Join the group, run the function, and wait until every rank has returned."""
    fn, args, kwargs = _reply_of(lambda: _join(call), pipe, lambda _: b"")
    pipe.recv_bytes()
    # Plain pickle copies tensors; a multiprocessing queue would share memory that a dying worker
    # takes with it.
    _reply_of(lambda: fn(*args, **kwargs), pipe, pickle.dumps)
    pipe.recv_bytes()


def _reply_of(
    fn: Callable[[], Any], pipe: connection.Connection, payload_of: Callable[[Any], bytes]
) -> Any:
    try:
        value = fn()
        payload = payload_of(value)
    except BaseException as error:  # SystemExit as well
        pipe.send_bytes(pickle.dumps(_Failed(_report(error), time.monotonic())))
        _flush()
        os._exit(1)  # closes the sockets, so that peers that wait for this rank fail at once
    pipe.send_bytes(pickle.dumps(_Returned(payload)))
    return value


def _join(call: _Call) -> Any:
    sys.path[:] = call.sys_path
    os.environ.update(
        RANK=str(call.rank), LOCAL_RANK=str(call.rank), WORLD_SIZE=str(call.world_size)
    )
    random.seed(0)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{call.rendezvous}",
        rank=call.rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_SECONDS),
    )
    return pickle.loads(call.payload)


@contextlib.contextmanager
def _restored_state() -> Iterator[None]:
    """Put back what a call may have changed, and drop what torch remembers of its meshes."""
    environ, folder, dtype = dict(os.environ), Path.cwd(), torch.get_default_dtype()
    with warnings.catch_warnings():  # "once per place" starts again in every call
        yield
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    _forget_meshes()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)
    torch.set_num_threads(1)
    _flush()


def _forget_meshes() -> None:
    # DTensor caches what an operation returns, by a mesh's ranks, not by its identity: a cached
    # answer would carry a mesh of an earlier call, whose groups are gone.
    # The functions are private: torch 2.10 has the two halves, 2.13 the same two under these names.
    torch.distributed.tensor.debug._clear_python_sharding_prop_cache()
    torch.distributed.tensor.debug._clear_fast_path_sharding_prop_cache()


def _die_with_parent(folder: Path) -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
    shutil.rmtree(folder, ignore_errors=True)  # the parent was killed, or it would be gone
    os.killpg(0, signal.SIGKILL)


def _report(error: BaseException) -> str:
    """The traceback from `fn` on; for a failed assertion, the local values beside it.

    pytest rewrites assertions in the parent only, so that in a worker they say nothing.
    """
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__ and frames.tb_next:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    if isinstance(error, AssertionError) and frames is not None:
        while frames.tb_next is not None:
            frames = frames.tb_next
        brief = reprlib.Repr()
        brief.maxother = brief.maxstring = brief.maxlong = 300
        values = frames.tb_frame.f_locals.items()
        text += "".join(f"  {name} = {brief.repr(value)}\n" for name, value in values)
    return text


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
