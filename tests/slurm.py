"""Train under a real Slurm of two nodes on this machine, with the launch file as it is shipped.

    python tests/slurm.py examples/train_gpt.py --checkpoints /tmp/gpt --steps 9000

The job's time ends after two minutes, so the training must take longer than 70 seconds: it has to
be stopped before, queued again, to resume (each later start prints "starts from" a checkpoint) and
to complete. A second job, whose script fails, must end with its error and stay ended. Needs root
and Debian's packages slurm-wlm, munge and procps. Slurm's files are in a temporary folder, its
ports are free ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch" / "slurm.sbatch"
SMALL = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# The launch file derives a port from the job's number, which must not be that of another test.
FirstJobId={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that was queued again waits until the credentials of its last start have expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:1
PartitionName=all Nodes=n[0-1] Default=YES MaxTime=INFINITE
"""


def missing() -> list[str]:
    """What this machine lacks."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "pkill")
    found = [f"{name} is not installed" for name in programs if not shutil.which(name)]
    if found:
        found.append("on Debian: apt install slurm-wlm munge procps")
    return found + ([] if os.geteuid() == 0 else ["slurmd needs root"])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def ask(*command: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {finished.stderr.strip()}")
    return finished.stdout.strip()


def wait_until(what: str, is_so: str, *command: str, timeout: float = 60) -> str:
    """The output of a command once it matches a regular expression."""
    deadline, output = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            output = ask(*command)
            if re.search(is_so, output):
                return output
        time.sleep(1)
    raise RuntimeError(f"after {timeout:.0f} seconds not {what}: {output}")


@contextlib.contextmanager
def slurm(folder: Path, proctrack: str) -> Iterator[None]:
    """A Slurm with two nodes, each of which believes that it has a GPU."""
    folder.chmod(0o755)  # munge wants its socket within everyone's reach
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "gpu").touch()
    (folder / "gres.conf").write_text(f"NodeName=n[0-1] Name=gpu File={folder}/gpu\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=yes\n")
    values = {"folder": folder, "proctrack": proctrack, "host": socket.gethostname()}
    (folder / "slurm.conf").write_text(CONFIG.format(**values, ports=free_ports(3)))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge_files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{name}" for option, name in munge_files.items()]
    daemons = [
        ["munged", "--foreground", f"--log-file={folder}/munge.log", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n0"],
        ["slurmd", "-D", "-N", "n1"],
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "daemons.log").open("wb") as log:
            for daemon in daemons:
                # In sessions of their own: a Ctrl-C must not end them before their jobs.
                process = subprocess.Popen(daemon, stdout=log, stderr=log, start_new_session=True)
                started.append(process)
                if daemon[0] == "munged":
                    wait_until("munge", "^MUNGE", "munge", "-n", f"-S{folder}/munge.socket")
        wait_until("two idle nodes", r"idle\s+idle", "sinfo", "--noheader", "-N", "-o", "%T")
        yield
    except BaseException:
        print((folder / "daemons.log").read_text(errors="replace")[-5000:], file=sys.stderr)
        raise
    finally:
        if len(started) == len(daemons):
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                ask("scancel", "--user=root")
                wait_until("all jobs ended", "^$", "squeue", "--noheader")
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def run(log: Path, *options_and_script: str) -> dict[str, str]:
    """Submits the launch file and waits for the job's end; prints its log, returns its record."""
    command = ["sbatch", "--parsable", f"--output={log}", *SMALL]
    job = ask(*command, *options_and_script)
    show = ("scontrol", "show", "job", job, "--oneliner")
    ended = rf"JobState=({'|'.join(ENDED)}) "
    record = dict(re.findall(r"(\w+)=(\S+)", wait_until("ended", ended, *show, timeout=1200)))
    print(log.read_text(), end="")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    kinds = ["linuxproc", "pgid", "cgroup"]
    parser.add_argument(
        "--proctrack", choices=kinds, default=kinds[0], help="Slurm's ProctrackType"
    )
    parser.add_argument("script", help="Python script that the job trains with")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args()
    if lacks := missing():
        sys.exit(f"slurm: not run: {'; '.join(lacks)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("slurm: ended by SIGTERM"))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the job's python
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    with tempfile.TemporaryDirectory() as name, slurm(folder := Path(name), args.proctrack):
        print(f"=== {ask('sbatch', '--version')}, proctrack/{args.proctrack}", flush=True)
        limit = ["--time=2", "--signal=USR1@50"]  # looked at every 30 s, so after 40 to 70 s
        training = (*limit, str(LAUNCH), args.script, *args.arguments)
        ask("sbatch", "--test-only", *SMALL, *training)
        trained = run(folder / "training.log", *training)
        starts = re.split(r"^slurm: job .*\n", (folder / "training.log").read_text(), flags=re.M)

        print("=== a script that fails", flush=True)
        (folder / "fails.py").write_text("raise SystemExit(3)\n")
        failed = run(folder / "failing.log", str(LAUNCH), str(folder / "fails.py"))
        jobs = (folder / "jobs").read_text()

    print("=== how Slurm recorded each start")
    for each in jobs.splitlines():
        print(*re.findall(r"(?<!\w)(?:JobId|JobState|StartTime|EndTime|ExitCode)=\S+", each))
    wrong = [
        what
        for what, is_so in {
            "the training completed": trained["JobState"] == "COMPLETED",
            "it was queued again": int(trained["Restarts"]) > 0,
            "each later start resumed": all(re.search("^starts from", s, re.M) for s in starts[2:]),
            "the failing job failed": failed["JobState"] == "FAILED",
            "with an error": failed["ExitCode"] == "1:0",
            "and was not queued again": failed["Restarts"] == "0",
        }.items()
        if not is_so
    ]
    if wrong:
        sys.exit(f"slurm: not so: {', '.join(wrong)}")
    print(f"slurm: stopped, queued again and resumed {trained['Restarts']} times, then complete")


if __name__ == "__main__":
    main()
