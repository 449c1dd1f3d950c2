"""Whole jobs: the examples as a user starts them, with python and with torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--steps", "6"]


def run(ranks: int, example: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    finished = subprocess.run(
        [*command, str(EXAMPLES / example), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def checksums(output: str) -> list[tuple[str, str]]:
    return re.findall(r"^(\w+) .*checksum ([0-9a-f]{32});", output, re.MULTILINE)


def test_the_quickstart_on_one_process_and_on_two(tmp_path: Path) -> None:
    for ranks in (1, 2):
        output = run(ranks, "quickstart.py", cwd=tmp_path)
        live, average = sorted({float(n) for n in re.findall(r"\d\.\d+", output)}, reverse=True)
        assert average < live / 2


def test_a_run_saved_on_two_ranks_resumes_on_three_and_on_one(tmp_path: Path) -> None:
    saved = run(2, "train_gpt.py", "--save=gpt", *TINY, cwd=tmp_path)
    assert len(checksums(saved)) == 2
    three = run(3, "train_gpt.py", "--parallel=ddp", "--resume=gpt", *TINY, cwd=tmp_path)
    assert checksums(three) == checksums(saved)
    one = run(1, "train_gpt.py", "--resume=gpt", *TINY, cwd=tmp_path)
    assert checksums(one) == checksums(saved)
    more = run(1, "train_gpt.py", "--resume=gpt", "--steps=8", "--save=more", cwd=tmp_path)
    assert len({*checksums(one), *checksums(more)}) == 4  # it went on


def test_every_layout_resumes_what_another_saved(tmp_path: Path) -> None:
    saved = run(2, "train_gpt.py", "--parallel=fsdp1", "--save=gpt", *TINY, cwd=tmp_path)
    assert len(checksums(saved)) == 2
    for layout in ("hsdp", "tp", "tp-fsdp2"):
        again = run(2, "train_gpt.py", f"--parallel={layout}", "--resume=gpt", *TINY, cwd=tmp_path)
        assert checksums(again) == checksums(saved)


def test_a_teacher_runs_in_every_step(tmp_path: Path) -> None:
    assert "step 200: cross entropy" in run(2, "teacher.py", cwd=tmp_path)
