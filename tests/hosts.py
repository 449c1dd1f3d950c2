"""Several hosts on one machine, for real: an address, a network and private folders of their own.

A host is a set of Linux namespaces (network, mounts, processes, name), joined to the others by a
switch that nothing else is on. What a host does not make private, such as a test's temporary
folder, all of them share. Nothing has a name outside of these namespaces, so that several test
processes have their hosts at once; and they end with this process, however it ends: the first
process of each host waits for the end of a pipe that is held here, and the kernel kills the others
and unmounts its folders when it goes.

    with Hosts(2) as hosts:
        job = hosts.run(function, [0, 0, 1, 1], "an argument")  # four ranks, two on each host
        job.wait_until_held()  # a rank has come to `hold()`
        job.cut(1)
        ended = job.wait()

Ranks are forked from a server that has torch loaded, so that a job begins at once. A rank is an
ordinary process otherwise: it ends as an interpreter does. One that runs for too long writes its
Python stacks to its output and ends.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTLED_SECONDS = 10.0  # for what takes milliseconds on an idle machine
_HERE = Path(__file__).parent


def why_not() -> str | None:
    """Why this machine cannot do it."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid():
        return "only root may make network namespaces"
    for tool in ("ip", "unshare", "nsenter", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    try:
        Hosts(2, serving=False).close()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"network namespaces do not work here: {error}"
    return None


class _Space:
    """Namespaces that last until `close`, or until this process ends."""

    def __init__(self, name: str) -> None:
        spaces = ["--net", "--mount", "--pid", "--uts", "--fork", "--mount-proc"]
        first = f"hostname {name} && ip link set lo up && echo ready && exec cat"
        self._first = subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._first.stdout is not None
        assert self._first.stderr is not None
        if self._first.stdout.readline() != b"ready\n":
            problem = self._first.stderr.read().decode().strip()
            self.close()
            raise RuntimeError(problem)
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self.pid = int(children.read_text())

    def inside(self, *spaces: str) -> list[str]:
        """The beginning of a command line that runs in these of the namespaces."""
        return ["nsenter", f"--target={self.pid}", *(f"--{space}" for space in spaces), "--"]

    def do(self, space: str, command: str) -> None:
        """Run words of a command in one of the namespaces, to their end."""
        words = [*self.inside(space), *command.split()]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr.strip()}")

    def close(self) -> None:
        for pipe in (self._first.stdin, self._first.stdout, self._first.stderr):
            assert pipe is not None
            pipe.close()
        self._first.wait(SETTLED_SECONDS)


class Hosts:
    """So many hosts, numbered from 0; a context manager.

    Args:
        count: How many.
        serving: Whether `run` will be called.
    """

    def __init__(self, count: int, *, serving: bool = True) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="distavg-hosts-"))
        self._spaces: list[_Space] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._jobs = 0
        names = [f"{self.address(host)} host-{host}" for host in range(count)]
        (self._folder / "names").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        try:
            self._switch = _Space("switch")
            self._spaces.append(self._switch)
            self._switch.do("net", "ip link add bridge type bridge")
            self._switch.do("net", "ip link set bridge up")
            self._hosts = [self._plug_in(host) for host in range(count)]
            if serving:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                self._server = self._start([sys.executable, str(Path(__file__).resolve())], **pipes)
                assert self._server.stdout is not None
                self._server.stdout.readline()  # it has torch loaded
        except BaseException:
            self.close()
            raise

    def _plug_in(self, host: int) -> _Space:
        space = _Space(f"host-{host}")
        self._spaces.append(space)
        peer = f"peer name eth0 netns {space.pid}"
        self._switch.do("net", f"ip link add port{host} type veth {peer}")
        self._switch.do("net", f"ip link set port{host} master bridge up")
        space.do("net", f"ip address add {self.address(host)}/24 dev eth0")
        space.do("net", "ip link set eth0 up")
        # A look-up elsewhere waits for its timeout.
        space.do("mount", f"mount --bind {self._folder / 'names'} /etc/hosts")
        return space

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything that runs on the hosts, and them."""
        for space in reversed(self._spaces):
            space.close()
        for process in self._started:
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            process.wait(SETTLED_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def address(host: int) -> str:
        """A host's address."""
        return f"10.0.0.{host + 1}"

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on a host; options are those of `Popen`."""
        inside = self._hosts[host].inside("net", "mount", "pid", "uts")
        return self._start([*inside, *command], **options)

    def _start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        environ = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        process = subprocess.Popen(command, env=environ, **options)
        self._started.append(process)
        return process

    def cut(self, host: int) -> None:
        """Pull a host's cable: packets vanish from now on, and no connection is reset."""
        self._switch.do("net", f"ip link set port{host} down")

    def plug(self, host: int) -> None:
        """Put it in again."""
        self._switch.do("net", f"ip link set port{host} up")

    def private(self, host: int, folder: Path) -> None:
        """Give a host an empty folder of its own in place of one that all share, for good."""
        self._hosts[host].do("mount", f"mount -t tmpfs tmpfs {folder}")

    def run(
        self, fn: Callable[..., Any], places: Sequence[int], *args: Any, timeout: float = 60.0
    ) -> Job:
        """Start a rank of a job on each of these hosts; the first has the store of the job.

        Args:
            fn: A function of a module's top level, which the ranks import by name.
            places: The host of each rank.
            args: Its arguments, pickled.
            timeout: Seconds after which a rank counts as hanging.
        """
        self._jobs += 1
        folder = self._folder / str(self._jobs)
        folder.mkdir()
        for rank, host in enumerate(places):
            environ = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(places[:rank].count(host)),
                "MASTER_ADDR": self.address(places[0]),
                "MASTER_PORT": "29500",
            }
            call = pickle.dumps((self._hosts[host].pid, folder, environ, timeout, fn, args))
            assert self._server.stdin is not None
            self._server.stdin.write(len(call).to_bytes(8, "little") + call)
            self._server.stdin.flush()
        return Job(self, folder, list(places), time.monotonic() + timeout)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank ended.

    Attributes:
        result: What its function returned; None where it did not return.
        code: Its exit status.
        at: When, by the machine's monotonic clock.
        output: What it wrote.
    """

    result: Any
    code: int
    at: float
    output: str


@dataclass
class Job:
    """Ranks that run on hosts."""

    hosts: Hosts
    folder: Path
    places: list[int]
    deadline: float
    cut_at: float = 0.0

    def wait_until_held(self) -> None:
        """Return when a rank has come to `hold`."""
        held, ended = self.folder / "held", self.folder / "ended-0"
        while not held.exists():
            if ended.exists() or time.monotonic() > self.deadline:
                raise RuntimeError(f"no rank came to hold(): {self.wait()}")
            time.sleep(0.01)

    def cut(self, host: int) -> None:
        """Pull a host's cable, and let what is held go on."""
        self.hosts.cut(host)
        self.cut_at = time.monotonic()
        _write(self.folder / "cut", self.cut_at)

    def wait(self) -> list[Ended]:
        """How each rank ended.

        Raises:
            TimeoutError: One has not, though its interpreter should have.
        """
        found = []
        for rank in range(len(self.places)):
            ended = self.folder / f"ended-{rank}"
            while not ended.exists():
                if time.monotonic() > self.deadline + SETTLED_SECONDS:
                    raise TimeoutError(f"rank {rank} hangs in its exit\n{self._output(rank)}")
                time.sleep(0.01)
            code, at = pickle.loads(ended.read_bytes())
            result = self.folder / f"result-{rank}"
            returned = pickle.loads(result.read_bytes()) if result.exists() else None
            found.append(Ended(returned, code, at, self._output(rank)))
        return found

    def results(self) -> list[Any]:
        """What each rank returned.

        Raises:
            RuntimeError: One did not return.
        """
        found = self.wait()
        for rank, ended in enumerate(found):
            if ended.code:
                raise RuntimeError(f"rank {rank} ended with {ended.code}\n{ended.output}")
        return [ended.result for ended in found]

    def _output(self, rank: int) -> str:
        return (self.folder / f"output-{rank}").read_text(errors="replace")


# ----------------------------------------------------------------------------- on the hosts

_job: list[Path] = []  # the folder of the job that this process is a rank of


def hold() -> None:
    """Wait where this rank is until the test has cut a host off."""
    (_job[0] / "held").touch()
    while not (_job[0] / "cut").exists():
        time.sleep(0.005)


def seconds_since_the_cut() -> float:
    """Nan where there was none."""
    try:
        return time.monotonic() - float(pickle.loads((_job[0] / "cut").read_bytes()))
    except FileNotFoundError:
        return float("nan")


def _write(path: Path, value: object) -> None:
    """Write a file that is whole when it is there."""
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(pickle.dumps(value))
    beside.rename(path)


def _serve() -> tuple[Callable[..., Any], tuple[Any, ...], Path] | None:
    """Fork a rank for each call; in the rank, return what it is to do."""
    running: dict[int, tuple[Path, str]] = {}
    calls = os.fdopen(os.dup(0), "rb", buffering=0)
    while True:
        readable, _, _ = select.select([calls], [], [], 0.01)
        for pid, (folder, rank) in list(running.items()):
            if (status := os.waitpid(pid, os.WNOHANG))[0]:
                del running[pid]
                code = os.waitstatus_to_exitcode(status[1])
                _write(folder / f"ended-{rank}", (code, time.monotonic()))
        if not readable:
            continue
        if not (head := calls.read(8)):
            return None
        call, wanted = b"", int.from_bytes(head, "little")
        while len(call) < wanted:
            call += calls.read(wanted - len(call)) or b""
        host, folder, environ, timeout, fn, args = pickle.loads(call)
        if pid := os.fork():
            running[pid] = folder, environ["RANK"]
            continue
        calls.close()
        _move_to(host)
        output = os.open(folder / f"output-{environ['RANK']}", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        faulthandler.dump_traceback_later(timeout, exit=True)
        os.environ.update(environ)
        return fn, args, folder


def _move_to(host: int) -> None:
    """Go on, in a process of its own, in the namespaces of another one."""
    libc = ctypes.CDLL(None, use_errno=True)
    for space in ("pid", "uts", "net", "mnt"):  # with "mnt" comes another /proc
        with Path(f"/proc/{host}/ns/{space}").open() as file:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {space}")
    if child := os.fork():  # only what is forked from now on has the new process ids
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)


def results_in(folder: Path, ranks: int) -> list[Any]:
    """What ranks have returned."""
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(ranks)]


def main() -> None:
    """Call one function, as torchrun wants a script to: hosts.py FOLDER MODULE NAME ARGUMENT...

    Without arguments serve, and in each rank that is forked, call its function and end as any
    script does.
    """
    if sys.argv[1:]:
        given, module, name, *words = sys.argv[1:]
        _job.append(Path(given))
        value = getattr(importlib.import_module(module), name)(*words)
        _write(Path(given) / f"result-{os.environ['RANK']}", value)
        return
    for name in ("torch", "torch.distributed.fsdp", "checks", "pytest", "distavg"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported is not garbage, of no rank
    print("ready", flush=True)
    if (task := _serve()) is not None:
        fn, args, folder = task
        _job.append(folder)
        result = fn(*args)
        _write(folder / f"result-{os.environ['RANK']}", result)


if __name__ == "__main__":
    from hosts import main  # so that the ranks' functions find this module, not a second one

    main()
