"""The launch files, each as it is shipped, with the quickstart as the job."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "launch").glob("*.s*"))
QUICKSTART = str(ROOT / "examples" / "quickstart.py")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port: int = one.getsockname()[1]
        return port


def errors_of_averages(folder: Path, settings: dict[str, str], *commands: list[str]) -> list[float]:
    """What the ranks print at the end, over commands that run at the same time."""
    programs = str(Path(sys.executable).parent)
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PROCESSES": "1"}
    jobs = [
        subprocess.Popen(
            ["bash", str(ROOT / "launch" / command[0]), *command[1:], QUICKSTART],
            cwd=folder,
            stdout=PIPE,
            stderr=DEVNULL,
            text=True,
            env={**os.environ, **env, **settings},
        )
        for command in commands
    ]
    try:
        printed = [job.communicate(timeout=100)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * len(jobs)
    return [float(each) for each in re.findall(r"their average: +(\S+)", "".join(printed))]


def test_one_machine(tmp_path: Path) -> None:
    settings = {"PROCESSES": "2"}
    found = errors_of_averages(tmp_path, settings, ["one_machine.sh"])
    assert len(found) == 2
    assert found[0] == found[1] < 0.1


def test_several_machines_that_find_each_other(tmp_path: Path) -> None:
    settings = {"ENDPOINT": f"localhost:{free_port()}"}
    found = errors_of_averages(tmp_path, settings, *[["several_machines.sh"]] * 2)
    assert len(found) == 2
    assert found[0] == found[1] < 0.1


def test_several_machines_with_numbers(tmp_path: Path) -> None:
    settings = {"FIRST": "localhost", "PORT": str(free_port())}
    commands = [["several_machines_static.sh", number] for number in "01"]
    found = errors_of_averages(tmp_path, settings, *commands)
    assert len(found) == 2
    assert found[0] == found[1] < 0.1


def test_machines_that_may_come_and_go(tmp_path: Path) -> None:
    settings = {"ENDPOINT": f"localhost:{free_port()}", "MACHINES": "2:3", "LAST_CALL": "1"}
    found = errors_of_averages(tmp_path, settings, *[["elastic.sh"]] * 2)
    assert len(found) == 2
    assert found[0] == found[1] < 0.1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_shell_understands_each(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_shellcheck_finds_nothing(file: Path) -> None:
    subprocess.run(["shellcheck", "--severity=warning", str(file)], check=True)
