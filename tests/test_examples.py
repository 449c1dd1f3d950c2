"""Whole jobs: the examples as a user starts them, with python and with torchrun."""

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any
from unittest import mock

import torch.distributed as dist
from ranks import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--steps", "4"]
QUICK = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, example: str, *arguments: str) -> list[str]:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*command, str(EXAMPLES / example), *arguments]


def run(ranks: int, example: str, *arguments: str, cwd: Path) -> str:
    finished = subprocess.run(
        torchrun(ranks, example, *arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        env=QUICK,
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


def test_the_digits_under_fsdp2(tmp_path: Path) -> None:
    tiny = ["--seeds", "1", "--epochs", "3", "--swa-epochs", "1", "2"]
    output = run(1, "train_digits.py", "--parallel", "fsdp2", "--mixup", *tiny, cwd=tmp_path)
    found = [float(each) for each in re.findall(r"(\d+\.\d+) \+- ", output)]
    assert len(found) == 11
    assert max(found) > 20  # of 10 for guesses


def test_the_picture_of_the_learning_rate(tmp_path: Path) -> None:
    run(1, "learning_rate.py", "rate.png", cwd=tmp_path)
    assert (tmp_path / "rate.png").read_bytes().startswith(b"\x89PNG")


def loaded(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
        spec.loader.exec_module(example)
    return example


def in_process(*arguments: str) -> str:
    """What train_gpt prints here, on ranks that have joined a process group already."""
    example = loaded("train_gpt")
    example.HELD_OUT = 12  # sequences, instead of 128
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch.object(sys, "argv", ["train_gpt.py", *arguments]),
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(signal, "signal"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # PyTorch's, about FSDP1 and its checkpoints
        example.main()
    return printed.getvalue()


def test_a_run_resumes_on_other_world_sizes_and_layouts(tmp_path: Path) -> None:
    saved = run(2, "train_gpt.py", "--checkpoints=gpt", *TINY, cwd=tmp_path)
    assert len(checksums(saved)) == 2
    resume = f"--checkpoints={tmp_path / 'gpt'}"
    for size, layout in [(3, "ddp"), (2, "fsdp1"), (2, "hsdp"), (2, "tp"), (2, "tp-fsdp2")]:
        printed = run_ranks(in_process, size, resume, f"--parallel={layout}", *TINY)
        assert checksums(printed[0]) == checksums(saved), layout
    more = run(1, "train_gpt.py", "--checkpoints=gpt", "--steps=8", cwd=tmp_path)
    assert len({*checksums(saved), *checksums(more)}) == 4  # it went on
    starts = (tmp_path / "gpt/starts.jsonl").read_text().splitlines()
    starts = [json.loads(line) for line in starts]
    assert [each["took"] for each in starts] == [None, *["step-4"] * 6]
    assert [each["ranks"] for each in starts] == [2, 3, 2, 2, 2, 2, 1]


def test_fsdp1_saves_what_fsdp2_resumes(tmp_path: Path) -> None:
    folder = f"--checkpoints={tmp_path}"
    saved = run_ranks(in_process, 2, folder, "--parallel=fsdp1", *TINY)
    again = run_ranks(in_process, 3, folder, *TINY)
    assert checksums(again[0]) == checksums(saved[0]) != []


def told_to_leave(told: signal.Signals, ranks: int, *command: str, cwd: Path) -> str:
    """What an example prints of which one rank is told to leave, some time after its start."""
    with subprocess.Popen(
        torchrun(ranks, *command), cwd=cwd, stdout=PIPE, stderr=DEVNULL, text=True, env=QUICK
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline().startswith("starts anew in ")
        time.sleep(1)
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(workers[0]) if ranks > 1 else job.pid, told)
        output = job.communicate(timeout=60)[0]
    # Not done, by its status: only who sends SIGUSR1 knows that. (torchrun's is 1 for any failure.)
    assert job.returncode == (0 if told == signal.SIGUSR1 else 1)
    return output


def test_a_run_that_is_told_to_leave_saves_and_goes_on_later(tmp_path: Path) -> None:
    command = ("train_gpt.py", "--checkpoints=gpt")
    output = told_to_leave(signal.SIGTERM, 2, *command, "--steps=100000", cwd=tmp_path)
    step = int(re.findall(r"left after step (\d+)$", output)[0])
    more = run(1, *command, f"--steps={step + 8}", cwd=tmp_path)
    assert more.startswith(f"starts from gpt/step-{step}\n")
    assert len(checksums(more)) == 2


def test_a_signal_that_comes_while_ranks_wait_counts_at_the_next_step() -> None:
    job = loaded("job")
    with (
        mock.patch.object(signal, "signal") as handle,
        mock.patch.object(dist, "is_initialized", return_value=True),
        mock.patch.object(dist, "get_rank", return_value=0),
        mock.patch.object(dist, "all_reduce") as meet,
    ):
        run = job.Job(None, mock.Mock(), mock.Mock(), mock.Mock())
        hear = handle.call_args_list[0].args[1]
        meet.side_effect = lambda *_: hear(signal.SIGTERM, None)
        assert (run.must_leave(), run.status) == (False, 0)  # as on the other ranks
        assert (run.must_leave(), run.status) == (True, 143)


def test_a_study_that_was_left_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    command = ("train_digits.py", "--seeds=1", "--epochs=9", "--swa-epochs", "2")
    folder = f"--checkpoints={tmp_path / 'digits'}"
    left = told_to_leave(signal.SIGUSR1, 1, *command, folder, cwd=tmp_path)
    assert left.endswith("told to leave\n")
    went_on = run(1, *command, folder, cwd=tmp_path)
    assert went_on.startswith(f"starts from {tmp_path}/digits/0-")
    table = "held-out accuracy"
    undisturbed = run(1, *command, cwd=tmp_path)
    assert went_on[went_on.index(table) :] == undisturbed[undisturbed.index(table) :]


def test_a_teacher_runs_in_every_step(tmp_path: Path) -> None:
    assert "step 200: cross entropy" in run(2, "teacher.py", cwd=tmp_path)
