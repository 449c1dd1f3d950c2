"""In-place arithmetic, bit for bit against PyTorch's own averaging functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from distavg import foreach
from distavg.foreach import Exchange, Lerp, checksum, chunks
from distavg.rules import EMA, SWA

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((5, 4), (7,), (), (1,), (3, 5, 4), (0,), (2, 0))


def randoms(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def bits(tensor: Tensor) -> Tensor:
    """Equal where all bits are, NaN and -0.0 included."""
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def strided(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor of this shape with strides of some kind."""
    if kind == "transposed" and shape:
        return torch.empty(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
    if kind == "columns":
        return torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]
    return torch.empty(shape, dtype=dtype)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few elements, so that small tensors are cut many times."""
    monkeypatch.setattr(foreach, "_CPU_CHUNK_BYTES", 24)


# ------------------------------------------------------------------------------------------ Lerp


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_ema_is_torchs(decay: float) -> None:
    averages, expected = randoms(0), randoms(0)
    update: Any = get_ema_multi_avg_fn(decay)
    lives = randoms(1)
    lerp = Lerp([averages], lives)
    for step in range(1, 6):
        torch._foreach_copy_(lives, randoms(step))
        lerp([EMA(decay).weight(step)])
        update(expected, lives, step)
    assert all(map(same, averages, expected))


def test_swa_is_torchs() -> None:
    averages, lives = randoms(0), randoms(1)
    expected = randoms(0)
    update: Any = get_swa_multi_avg_fn()
    lerp = Lerp([averages], lives)
    for step in range(1, 10):
        torch._foreach_copy_(lives, randoms(step))
        lerp([SWA().weight(step)])
        update(expected, lives, step)  # what AveragedModel does from the second update on
    assert all(map(same, averages, expected))


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    st.integers(1, 300),
    st.lists(st.integers(0, 300), max_size=4),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_a_cut_changes_no_bit(
    dtype: torch.dtype, size: int, cuts: list[int], weight: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    live, whole = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    pieces = whole.clone()
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    ranges = list(itertools.pairwise(edges))
    Lerp([[whole]], [live])([weight])
    Lerp([[pieces[a:b] for a, b in ranges]], [live[a:b] for a, b in ranges])([weight])
    assert same(whole, pieces)


@pytest.mark.parametrize("live_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("small_chunks")
def test_mixed_dtypes_average_the_converted_values(
    live_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    lives = randoms(0, live_dtype)
    averages, expected = randoms(1, dtype), randoms(1, dtype)
    lerp = Lerp([averages], lives)
    for step, weight in enumerate([0.3, 0.001, 0.5], start=2):
        torch._foreach_copy_(lives, randoms(step, live_dtype))
        lerp([weight])
        torch._foreach_lerp_(expected, [live.to(dtype) for live in lives], weight)
    assert all(map(same, averages, expected))


def test_fp32_averages_of_bf16_weights_do_not_stall() -> None:
    """A bf16 average moves by nothing at a weight of 0.001; an fp32 one gets there."""
    live = torch.full((4,), 2.0, dtype=torch.bfloat16)
    stalled, moving = torch.ones(4, dtype=torch.bfloat16), torch.ones(4)
    lerp = Lerp([[stalled], [moving]], [live])
    for _ in range(5000):
        lerp([0.001, 0.001])
    assert torch.equal(stalled, torch.ones(4, dtype=torch.bfloat16))
    # 5000 roundings of 2**-24 each, mended by the decay: far less than 0.001.
    torch.testing.assert_close(moving, torch.full((4,), 2 - 0.999**5000), rtol=0, atol=1e-3)


@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_1_copies_nan_away(live_dtype: torch.dtype) -> None:
    lives = randoms(0, live_dtype)
    averages = [torch.full_like(live, float("nan"), dtype=torch.float32) for live in lives]
    Lerp([averages], lives)([1])
    assert all(same(a, b.float()) for a, b in zip(averages, lives, strict=True))


def test_a_lerp_would_keep_nan() -> None:
    """Why a weight of 1 is a copy."""
    poisoned = torch.full((3,), float("nan"))
    assert poisoned.lerp_(torch.ones(3), 1.0).isnan().all()


@pytest.mark.parametrize("kinds", [("transposed", "transposed"), ("columns", "rows")])
@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_chunks")
def test_non_contiguous_tensors(kinds: tuple[str, str], live_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start, value = (torch.randn(5, 6, 4, generator=generator) for _ in range(2))
    average = strided((5, 6, 4), kinds[0]).copy_(start)
    live = strided((5, 6, 4), kinds[1], live_dtype).copy_(value)
    Lerp([[average]], [live])([0.3])
    assert same(average, start.lerp(value.to(live_dtype).float(), 0.3))


SOME = st.lists(st.none() | st.floats(0, 1), min_size=3, max_size=3)


@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bytes_of_block", [4, 24, 10**6])
@given(st.lists(SOME, min_size=1, max_size=4))
def test_averages_together_are_the_averages_alone(
    live_dtype: torch.dtype, bytes_of_block: int, updates: list[list[float | None]]
) -> None:
    """Also where only some of them are due; the third is of another dtype."""
    dtypes = [torch.float32, torch.float32, torch.float64]
    lives = randoms(0, live_dtype)
    with mock.patch.multiple(
        foreach, _CPU_BLOCK_BYTES=bytes_of_block, _CPU_CHUNK_BYTES=bytes_of_block
    ):
        together = [randoms(i, dtype) for i, dtype in enumerate(dtypes, start=1)]
        alone = [randoms(i, dtype) for i, dtype in enumerate(dtypes, start=1)]
        lerp = Lerp(together, lives)
        lerps = [Lerp([averages], lives) for averages in alone]
        for step, weights in enumerate(updates, start=2):
            torch._foreach_copy_(lives, randoms(step, live_dtype))
            lerp(weights)
            for each, weight in zip(lerps, weights, strict=True):
                each([weight])
    for averages, expected in zip(together, alone, strict=True):
        assert all(map(same, averages, expected))


def test_a_function_in_place_of_a_weight() -> None:
    lives, averages = randoms(0, torch.bfloat16), randoms(1)

    def halve(averaged: list[Tensor], live: list[Tensor]) -> None:
        assert {tensor.dtype for tensor in averaged + live} == {torch.float32}
        for old, new in zip(averaged, live, strict=True):
            old.add_(new).div_(2)

    expected = [(a + b.float()) / 2 for a, b in zip(averages, lives, strict=True)]
    Lerp([averages], lives)([halve])
    assert all(map(same, averages, expected))


def test_integers_are_copied() -> None:
    counts, flags = torch.tensor([1, 2]), torch.tensor([True, False])
    held = [torch.zeros_like(counts), torch.zeros_like(flags)]
    Lerp([held], [counts, flags])([1])
    assert torch.equal(held[0], counts)
    assert torch.equal(held[1], flags)


def test_nothing_to_average_is_no_error() -> None:
    Lerp([], [])([])
    Lerp([[]], [])([0.5])


def test_averages_and_lives_must_pair() -> None:
    with pytest.raises(ValueError, match="longer"):
        Lerp([[torch.ones(1), torch.ones(1)]], [torch.ones(1)])


@pytest.mark.parametrize("weight", [1, 0.5])
@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16])
def test_autograd_sees_the_write(weight: float, live_dtype: torch.dtype) -> None:
    average, live = torch.ones(3), torch.zeros(3, dtype=live_dtype, requires_grad=True)
    before = average._version, live._version
    Lerp([[average]], [live])([weight])
    assert average._version > before[0]
    assert live._version == before[1]
    assert not average.requires_grad


# ------------------------------------------------------------------------------------- Exchange


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "kinds", [("rows", "rows"), ("transposed", "rows"), ("columns", "columns")]
)
@pytest.mark.usefixtures("small_chunks")
def test_exchange(dtype: torch.dtype, kinds: tuple[str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randint(0, 2, (5, 3, 4), generator=generator).to(dtype) for _ in range(2)]
    a, b = (strided((5, 3, 4), k, dtype).copy_(v) for k, v in zip(kinds, values, strict=True))
    Exchange([(a, b)]).go()
    assert same(a, values[1])
    assert same(b, values[0])


def test_exchange_keeps_nan_payloads_and_signed_zeros() -> None:
    a = torch.tensor([0x7FC00123, -0x80000000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    b = torch.tensor([1.0, -0.0, float("inf")])
    first, second = a.clone(), b.clone()
    Exchange([(a, b)]).go()
    assert same(a, second)
    assert same(b, first)


def test_exchange_of_a_big_transposed_tensor() -> None:
    """Three chunks and a rest, at the real chunk size."""
    rows = torch.arange(900_000, dtype=torch.float32).view(900, 1000)
    a = strided((900, 1000), "transposed").copy_(rows)
    b = rows.neg()
    Exchange([(a, b)]).go()
    assert same(a, rows.neg())
    assert same(b, rows)


@pytest.mark.parametrize("shape", [(), (0,), (1,)])
def test_exchange_of_next_to_nothing(shape: tuple[int, ...]) -> None:
    a, b = torch.full(shape, 1.0), torch.full(shape, 2.0)
    Exchange([(a, b)]).go()
    assert torch.equal(a, torch.full(shape, 2.0))
    assert torch.equal(b, torch.full(shape, 1.0))


def test_many_tensors_are_exchanged_through_one_buffer() -> None:
    sizes = [3, 0, 1, 7, 2**18, 5, 3 * 2**18 + 1, 2]
    a = [torch.randn(size) for size in sizes]
    b = [torch.randn(size) for size in sizes]
    before_a, before_b = [t.clone() for t in a], [t.clone() for t in b]
    exchange = Exchange(list(zip(a, b, strict=True)))
    for _ in range(2):  # the second time there is nothing left to do
        exchange.go()
        assert all(torch.equal(x, y) for x, y in zip(a, before_b, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(b, before_a, strict=True))
    for _ in range(2):
        exchange.come_back()
        assert all(torch.equal(x, y) for x, y in zip(a, before_a, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(b, before_b, strict=True))


def test_exchange_is_seen_by_autograd() -> None:
    a, b = torch.ones(3, requires_grad=True), torch.zeros(3)
    loss = (a * a).sum()
    before = a._version, b._version
    Exchange([(a, b)]).go()
    assert a._version > before[0]
    assert b._version > before[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


# -------------------------------------------------------------------------------- bounded memory


def largest_allocation(fn: Callable[[], object]) -> int:
    """Bytes of the largest single block that PyTorch takes on the CPU meanwhile."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        fn()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def test_temporaries_are_bounded() -> None:
    big = 4 * 2**20  # 16 MiB of fp32
    a, b = torch.zeros(big), torch.ones(big)
    half = torch.zeros(big, dtype=torch.bfloat16)
    transposed = torch.zeros(2048, 2048).t()
    assert largest_allocation(lambda: a.clone()) == 16 * 2**20  # the measurement itself
    for fn in (
        lambda: Exchange([(a, b)]).go(),
        lambda: Exchange([(transposed, b.view(2048, 2048))]).go(),
        lambda: Lerp([[a]], [half])([0.5]),
        lambda: Lerp([[a]], [half])([1]),
        lambda: Lerp([[a]], [b])([0.5]),
        lambda: Lerp([[transposed]], [half.view(2048, 2048)])([0.5]),
    ):
        assert largest_allocation(fn) <= foreach._CPU_CHUNK_BYTES


# ---------------------------------------------------------------------------------------- chunks


@given(
    st.lists(st.integers(0, 6), max_size=4).map(tuple),
    st.integers(1, 50),
    st.sampled_from(["rows", "transposed"]),
)
def test_chunks_cover_all_elements_once(shape: tuple[int, ...], most: int, kind: str) -> None:
    count = torch.zeros(shape)
    strange = strided(shape, kind).zero_()
    for parts in chunks((count, strange), most):
        assert parts[0].shape == parts[1].shape
        assert parts[0].numel() <= most or parts[0].numel() == count.numel() <= most
        for part in parts:
            part += 1
    assert torch.equal(count, torch.ones(shape))
    assert torch.equal(strange, torch.ones(shape))


# -------------------------------------------------------------------------------------- checksum


@given(
    st.integers(0, 70),
    st.integers(0, 9),
    st.sampled_from([*FLOATS, torch.int64, torch.int8, torch.bool]),
    st.integers(0, 2**31),
)
def test_checksum_depends_on_the_bits_alone(
    size: int, offset: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(size, generator=generator) * 10).to(dtype)
    storage = torch.zeros(size + offset, dtype=dtype)
    shifted = storage[offset:].copy_(values)  # storage offsets that are no multiple of 8 bytes
    spread = torch.zeros(size, 2, dtype=dtype)[:, 0].copy_(values)
    assert checksum(values) == checksum(shifted) == checksum(spread)


@given(st.integers(1, 70), st.data(), st.sampled_from([torch.float32, torch.float16, torch.int8]))
def test_checksum_finds_one_flipped_bit(size: int, data: st.DataObject, dtype: torch.dtype) -> None:
    values = torch.zeros(size, dtype=dtype)
    before = checksum(values)
    byte = data.draw(st.integers(0, values.nbytes - 1))
    values.view(torch.uint8)[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(values) != before


def test_checksum_of_special_tensors() -> None:
    assert checksum(torch.zeros(0)) == checksum(torch.zeros(3, 0)) == 0
    assert checksum(torch.tensor(1.5)) == checksum(torch.tensor([1.5]))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.full((3,), float("nan"))) == checksum(torch.full((3,), float("nan")))
    assert checksum(torch.ones(2, requires_grad=True)) == checksum(torch.ones(2))


def test_checksum_wraps_around() -> None:
    assert isinstance(checksum(torch.full((64,), 2**62)), int)
