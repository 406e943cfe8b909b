"""Blocks of a plan: as many rows as fit, within what is wished for; and how a plan reads."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import plan
from fastagop.kernels.plan import Plan, block_rows, fitting_rows

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("row_bytes", "rows"), [(0, 256), (1, 256), (2**17, 256), (2**25 // 200, 200), (2**18, 128), (2**30, 128)]
)
def test_blocks_aim_at_32_megabytes_and_at_128_to_256_rows(row_bytes, rows):
    assert block_rows(row_bytes, 10, 2**50, 10**6, "it") == rows
    assert fitting_rows(lambda r: 10 + r * row_bytes, 2**50, 10**6, "it") == (rows, 10 + rows * row_bytes)


@pytest.mark.parametrize("most", [1, 5, 255])
def test_blocks_have_no_more_rows_than_there_are(most):
    assert block_rows(8, 0, 10**9, most, "it") == most
    assert fitting_rows(lambda r: 8 * r, 10**9, most, "it") == (most, 8 * most)


@pytest.mark.parametrize("room", [100, 101, 199, 200, 350, 999, 5000, 12_799, 12_800, 25_700])
def test_blocks_take_the_room_there_is(room):
    """100 bytes a row beside 7; the second kind of block grows by steps."""
    assert block_rows(100, 7, 7 + room, 10**6, "it") == min(256, room // 100)
    for taken in (lambda r: 7 + 100 * r, lambda r: 7 + 90 * r + 50 * (r // 3), lambda r: 7 + 50 * r + r * r // 2):
        if taken(1) > 7 + room:
            continue
        rows, needed = fitting_rows(taken, 7 + room, 10**6, "it")
        assert rows == max(r for r in range(1, 257) if taken(r) <= 7 + room)
        assert needed == taken(rows)


def test_a_single_row_that_does_not_fit():
    with pytest.raises(MemoryError) as refused:
        block_rows(1000, 500, 1499, 9, "the thing", "do that")
    text = "the thing needs 1.5 kB for a single row block, but 1.5 kB may be used; do that"
    assert str(refused.value) == text
    assert block_rows(1000, 500, 1500, 9, "it") == 1
    with pytest.raises(MemoryError, match=r"the thing needs 1\.5 kB .* but 999 B may be used; do that"):
        fitting_rows(lambda r: 500 + 1000 * r, 999, 9, "the thing", "do that")
    with pytest.raises(MemoryError, match="use fewer points, or free memory"):
        fitting_rows(lambda r: 500 + 1000 * r, 1499, 9, "the thing")
    assert fitting_rows(lambda r: 500 + 1000 * r, 1500, 9, "it") == (1, 1500)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_900, "999.9 kB"), (10**6, "1.0 MB"), (2.5e9, "2.5 GB"),
     (7e12, "7000.0 GB")],
)  # fmt: skip
def test_bytes_in_words(count, words):
    assert plan.format_bytes(count) == words


def test_a_limit_bounds_a_call_and_else_most_of_what_is_free(monkeypatch):
    monkeypatch.setattr(plan, "host_bytes", lambda: 1000)
    cpu = torch.device("cpu")
    assert plan.budget(None, cpu) == 900
    assert plan.budget(5000.7, cpu) == 5000
    assert plan.budget(0, cpu) == 0


def test_free_memory_of_a_gpu_counts_what_torch_keeps(monkeypatch):
    """A capture must not ask the driver: the whole device counts there."""
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"total_memory": 1000}))
    monkeypatch.setattr(plan, "host_bytes", lambda: 7)
    assert plan.available_bytes(CUDA) == 100 + 50 - 20
    name = "get_per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # nobody has asked for a share before that
    for share, left in ((1.0, 130), (0.5, 130), (0.06, 40), (0.01, 0)):
        monkeypatch.setattr(torch.cuda, name, lambda device, share=share: share, raising=False)
        assert plan.available_bytes(CUDA) == left
    monkeypatch.delattr(torch.cuda, name)
    assert plan.available_bytes(CUDA) == 130
    capturing.append(True)
    assert plan.available_bytes(CUDA) == 1000
    assert plan.available_bytes(torch.device("cpu")) == 7


def test_how_a_plan_reads():
    made = Plan("agop", "torch", "gram", "why so", "float32, highest", 1.5e9, 2_500_000, 128)
    text = [
        "agop: backend torch, method gram",
        "  why        why so",
        "  precision  float32, highest",
        "  work       1.5e+09 floating-point operations",
        "  memory     2.5 MB beyond the inputs, in blocks of 128 rows",
    ]
    assert str(made).splitlines() == text
    timed = Plan("agop", "torch", "gram", "why so", "float32, highest", 1.5e9, 2_500_000, 128, 0.1234)
    assert str(timed).splitlines() == [*text[:4], "  seconds    about 0.12", text[4]]


def test_the_longest_blocks_of_a_lower_triangle_come_first():
    assert list(plan.longest_first(10, 4)) == [8, 4, 0]
    assert list(plan.longest_first(8, 4)) == [4, 0]
