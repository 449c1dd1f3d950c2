"""What the README shows is what the code does."""

from pathlib import Path

import pytest
from torch import nn

from distavg import EMA, Averager, CheckpointMismatch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


class Padded(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 192)


def test_the_error_message_is_a_real_one(tmp_path: Path) -> None:
    Averager(Padded(256), EMA()).save(tmp_path / "saved")
    with pytest.raises(CheckpointMismatch) as caught:
        Averager(Padded(320), EMA()).load(tmp_path / "saved")
    assert f"distavg.errors.CheckpointMismatch: {caught.value}" in README
