"""Saves that meet faults for real. `python tests/crashes.py` tries every system call.

`python tests/soak.py` breaks whole jobs; `.ci/run` calls it for two minutes.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checks import error_of, feed, trained
from crashes import FAULTS, NEW, OLD, cases_of, offences, state_of, why_not
from models import Uneven


@pytest.fixture(scope="module")
def reason() -> str | None:
    return why_not()


def test_a_sample_of_the_system_calls(tmp_path: Path, reason: str | None) -> None:
    if reason:
        pytest.skip(reason)
    cases = [case for rank in (0, 1) for case in cases_of(tmp_path, rank)]
    assert len(cases) > 50
    assert {call for _, call, _ in cases} >= {"openat", "mkdir", "write", "fsync", "rename"}
    for number, case in enumerate(cases[::10]):
        fault = FAULTS[number % len(FAULTS)]
        assert offences(tmp_path, case, fault) == [], (case, fault)


def test_a_save_that_is_careless_is_found(tmp_path: Path, reason: str | None) -> None:
    if reason:
        pytest.skip(reason)
    cases = cases_of(tmp_path, 0)
    fsync = next(case for case in cases if case[1] == "fsync")
    found = offences(tmp_path, fsync, "signal=SIGKILL", is_careless=True)
    assert "the folder holds nothing" in found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_disk_that_fills_up_at_any_moment(small_disk: Path) -> None:
    model, averager = trained("plain", Uneven, OLD)
    averager.save(small_disk / "a")
    feed(averager, model, NEW[len(OLD) :])
    filler, seen = small_disk / "filler", []
    for free_pages in range(16):
        filler.write_bytes(b"")
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(free - 4096 * free_pages))
        text = error_of(averager.save, small_disk / "a", overwrite=True)
        state = state_of(small_disk / "a")
        seen.append(state)
        assert (state == "new") == (text == "nothing"), text
        assert state == "new" or "needs" in text or "No space left on device" in text
        if state == "new":
            break
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert len(seen) > 3
    filler.unlink()
    averager.save(small_disk / "b")
    assert state_of(small_disk / "b") == "new"
