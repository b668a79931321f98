"""VarlenBatch: what it says of a batch, there and back, and what it refuses."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastenc.nn import VarlenBatch

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
IDS = torch.arange(20).view(4, 5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_every_padding_and_mask_dtype(dtype):
    batch = VarlenBatch.from_padded(IDS, MASK.to(dtype))
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 13] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.total_tokens, batch.num_seqs) == (5, 13, 4)
    assert batch.input_ids.tolist() == IDS[MASK.bool()].tolist()
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.columns.tolist() == [2, 3, 4, 0, 1, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch.lengths.tolist() == [3, 2, 3, 5] and not batch.gaps


def test_no_padding_moves_nothing():
    ids = torch.arange(6).view(2, 3)
    for mask in (None, torch.ones(2, 3)):
        batch = VarlenBatch.from_padded(ids, mask)
        assert batch.cu_seqlens.tolist() == [0, 3, 6] and batch.indices is None
        assert batch.positions.tolist() == batch.columns.tolist() == [0, 1, 2, 0, 1, 2]
        x = torch.randn(2, 3, 4)
        assert batch.pack(x).data_ptr() == batch.pad(batch.pack(x)).data_ptr() == x.data_ptr()


def test_holes_keep_their_distance():
    batch = VarlenBatch.from_padded(IDS[:2], torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]]))
    assert batch.gaps and batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.positions.tolist() == [0, 2, 3, 0, 1]
    none_at_the_end = VarlenBatch.from_padded(IDS[:2], torch.tensor([[1, 0, 1, 0, 1], [0] * 5]))
    assert none_at_the_end.gaps and none_at_the_end.positions.tolist() == [0, 2, 4]


def test_rows_that_are_split_stay_rows():
    batch = VarlenBatch.from_padded(IDS[:2]).split(torch.tensor([0, 3, 5, 10]), 5)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.lengths.tolist() == [3, 2, 5]
    assert batch.max_seqlen == 5 and batch.split(batch.cu_seqlens, 7).max_seqlen == 7
    assert batch.split(batch.cu_seqlens).max_seqlen == 5
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
    for x in (batch.input_ids, batch.input_ids.unsqueeze(1).float()):
        assert batch.first(x).flatten().tolist() == [0, 5]
    assert torch.equal(batch.pad(batch.input_ids), IDS[:2])


def test_rows_without_a_token():
    mask = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0]])
    batch = VarlenBatch.from_padded(torch.zeros(3, 3, dtype=torch.long), mask)
    assert batch.cu_seqlens.tolist() == [0, 0, 2, 2] and not batch.gaps
    packed = torch.ones(2, 4)
    assert batch.pad(packed).sum((1, 2)).tolist() == [0, 8, 0]
    assert batch.first(packed).sum(1).tolist() == [0, 4, 0]
    nothing = VarlenBatch.from_padded(torch.zeros(3, 3, dtype=torch.long), torch.zeros(3, 3))
    assert nothing.total_tokens == nothing.max_seqlen == 0 and nothing.positions.shape == (0,)
    assert nothing.pad(torch.zeros(0, 2)).shape == (3, 3, 2)
    columns = VarlenBatch.from_padded(torch.zeros(2, 0, dtype=torch.long))
    assert columns.num_seqs == 2 and torch.equal(columns.first(torch.ones(0, 3)), torch.zeros(2, 3))


def test_positions_that_fall_start_a_sequence():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    batch = VarlenBatch.from_padded(IDS[:2], position_ids=positions)
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 10] and batch.max_seqlen == 5
    assert batch.positions.tolist() == positions.flatten().tolist()
    masked = VarlenBatch.from_padded(IDS[:2], torch.ones(2, 5), position_ids=positions)
    assert masked.cu_seqlens.tolist() == [0, 5, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    "mask", [MASK, torch.ones(4, 5), MASK * torch.tensor([[1], [0], [1], [0]])]
)
def test_the_first_token_of_every_row(mask, shape, dtype):
    batch = VarlenBatch.from_padded(IDS, mask)
    packed = torch.arange(batch.total_tokens).view(-1, *(1,) * len(shape)).expand(-1, *shape) + 1
    edges = batch.cu_seqlens.tolist()
    expected = [a + 1 if b > a else 0 for a, b in itertools.pairwise(edges)]
    found = batch.first(packed.to(dtype))
    assert found.dtype == dtype and found.shape == (4, *shape)
    assert torch.equal(found.flatten(1).amin(1) if shape else found,
                       torch.tensor(expected).to(dtype))  # fmt: skip


def test_the_first_token_where_there_is_none():
    batch = VarlenBatch.from_padded(IDS, torch.zeros(4, 5))
    assert torch.equal(batch.first(torch.empty(0, dtype=torch.int64)), torch.zeros(4).long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_positions_that_fall_in_any_integer_dtype(dtype):
    batch = VarlenBatch.from_padded(IDS[:1], position_ids=torch.tensor([[0, 1, 0, 1, 2]]).to(dtype))
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


def test_lists():
    batch = VarlenBatch.from_lists([[5, 6], [], torch.tensor([7, 8, 9])])
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 5] and batch.max_seqlen == 3
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.pad(batch.input_ids).tolist() == [[5, 6, 0], [0, 0, 0], [7, 8, 9]]
    assert batch.pack(batch.pad(batch.input_ids)).tolist() == batch.input_ids.tolist()
    empty = VarlenBatch.from_lists([])
    assert empty.num_seqs == empty.total_tokens == empty.max_seqlen == 0


def test_cu_seqlens():
    batch = VarlenBatch.from_cu_seqlens(torch.tensor([0, 2, 2, 5]))
    assert (batch.total_tokens, batch.max_seqlen) == (5, 3)
    assert batch.cu_seqlens.dtype == torch.int32
    assert VarlenBatch.from_cu_seqlens(torch.tensor([0, 5]), torch.arange(5), 9).max_seqlen == 9


@pytest.mark.parametrize("make", [
    lambda x: VarlenBatch.from_padded(x[0]),
    lambda x: VarlenBatch.from_padded(x, torch.ones(4, 6)),
    lambda x: VarlenBatch.from_padded(),
    lambda x: VarlenBatch.from_padded(x, position_ids=torch.zeros(3, 5)),
    lambda x: VarlenBatch.from_padded(x, MASK).pack(torch.zeros(5, 4)),
    lambda x: VarlenBatch.from_padded(x, MASK).pad(torch.zeros(12, 4)),
    lambda x: VarlenBatch.from_cu_seqlens(torch.tensor([0, 3, 2, 20]), x.flatten()),
    lambda x: VarlenBatch.from_cu_seqlens(torch.tensor([0, 19]), x.flatten()),
    lambda x: VarlenBatch.from_cu_seqlens(torch.tensor([1, 20]), x.flatten()),
    lambda x: VarlenBatch.from_cu_seqlens(torch.tensor([0, 20]), x.flatten(), 19),
    lambda x: VarlenBatch.from_cu_seqlens(torch.tensor([0.0, 20.0]), x.flatten()),
    lambda x: VarlenBatch.from_cu_seqlens(torch.zeros(0, dtype=torch.int32), x.flatten()),
])  # fmt: skip
def test_misuse_is_a_value_error(make):
    with pytest.raises(ValueError, match=r"expected|longest"):
        make(IDS)


def test_nan_in_the_padding_stays_there():
    batch = VarlenBatch.from_padded(IDS, MASK)
    x = torch.randn(4, 5, 3)
    x[MASK == 0] = torch.nan
    x.requires_grad_()
    packed = batch.pack(x)
    assert packed.isfinite().all()
    (packed * 2).sum().backward()
    assert torch.equal(x.grad, 2.0 * MASK.unsqueeze(-1).expand(4, 5, 3))


def test_pad_gradients():
    batch = VarlenBatch.from_padded(IDS, MASK)
    packed = torch.randn(13, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(batch.pad, packed)
    padded = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(batch.pack, padded)
    assert (batch.pad(packed, value=-7.0)[MASK == 0] == -7).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(0, 7), st.randoms(use_true_random=False))
def test_there_and_back(rows, columns, random):
    drawn = [random.random() < 0.6 for _ in range(rows * columns)]
    mask = torch.tensor(drawn, dtype=torch.bool).view(rows, columns)
    x = torch.arange(rows * columns).view(rows, columns)
    batch = VarlenBatch.from_padded(x, mask)
    assert batch.input_ids.tolist() == x[mask].tolist()
    assert torch.equal(batch.pad(batch.input_ids, value=-1), torch.where(mask, x, -1))
    assert batch.lengths.tolist() == mask.sum(1).tolist()
    assert batch.max_seqlen == (max(mask.sum(1).tolist()) if rows and columns else 0)


def synchronisations(act) -> int:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.gpu
def test_synchronisations_on_a_gpu():
    ids, mask = IDS.cuda(), MASK.cuda()
    cu_seqlens = torch.tensor([0, 5, 20], dtype=torch.int32, device="cuda")

    def use(batch):
        return batch.pad(batch.pack(ids)), batch.positions, batch.columns

    assert synchronisations(lambda: use(VarlenBatch.from_padded(ids, mask))) == 1
    assert synchronisations(lambda: use(VarlenBatch.from_padded(ids, MASK))) == 0
    assert synchronisations(lambda: use(VarlenBatch.from_padded(ids))) == 0
    assert synchronisations(lambda: VarlenBatch.from_lists([[1], [2, 3]], "cuda").positions) == 0
    packed = (cu_seqlens, ids.flatten(), 15)
    assert synchronisations(lambda: VarlenBatch.from_cu_seqlens(*packed).positions) == 0


def test_lists_of_any_kind():
    expected = [1, 2, 3]
    for lists in (
        [[1, 2], [], [3]],
        iter([[1, 2], [], [3]]),
        ((1, 2), (), (3,)),
        [torch.tensor([1, 2]), [], torch.tensor([3], dtype=torch.int32)],
    ):
        batch = VarlenBatch.from_lists(lists)
        assert batch.input_ids.tolist() == expected and batch.input_ids.dtype == torch.int64
        assert batch.cu_seqlens.tolist() == [0, 2, 2, 3]
    with pytest.raises(TypeError, match="expected integers, got"):
        VarlenBatch.from_lists([[1.5, 2], [3]])
    with pytest.raises(TypeError, match="expected integers, got"):
        VarlenBatch.from_lists([torch.ones(2), torch.tensor([3])])
    with pytest.raises(ValueError, match=r"token_lists\[0\]: expected 1 dimensions"):
        VarlenBatch.from_lists([torch.ones(2, 2).long()])


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 5]), ValueError, "expected to run from 0 to total_tokens = 8, got 0 to"),
        (torch.tensor([0, 6, 4, 8]), ValueError, "expected non-decreasing"),
        ([0, 4, 8], TypeError, "expected a tensor, got list"),
    ],
)
def test_a_split_is_checked(cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        VarlenBatch.from_padded(shape=(1, 8)).split(cu_seqlens)
