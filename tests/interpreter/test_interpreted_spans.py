"""The span kernels: parity, candidates in the order of the reference, no leakage, one mask."""

import sys

import pytest
import torch
from test_interpreted_parity import check

import fastenc
from fastenc import testing
from fastenc.ops._span_ref import span_candidates_ref, span_keep

CASES = [case for op in ("span_pool", "span_score") for case in testing.cases(op, "small")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_parity(case, dtype):
    check(case, dtype)


def inputs(lengths, size=20, labels=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = (sum(lengths), size), (sum(lengths), size), (len(lengths), labels, size)
    tensors = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return (*tensors, testing.cu_seqlens_of(lengths))


@pytest.mark.parametrize(("labels", "size"), [(1, 8), (16, 8), (17, 70), (40, 8)])
def test_labels_and_columns_past_a_block(labels, size):
    """Label blocks, column blocks, sequences in several chunks and tiles, dropout in them all."""
    args = (*inputs((0, 9, 1, 25), size, labels), 5)
    options = {"label_bias": torch.randn(4, labels), "dropout_p": 0.3, "seed": -(2**40) - 3}
    check(testing.Case("span_score", "blocks", lambda *_: (args, options)), torch.float32)


@pytest.mark.parametrize("chunk", [0, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_labels_whole_and_in_chunks(monkeypatch, chunk, dtype):
    from fastenc.triton_kernels import span_score_bwd

    monkeypatch.setattr(span_score_bwd, "chunk_of", lambda *_: chunk)
    args = (*inputs((3, 0, 31), 33, 5, dtype=dtype), 4)
    check(testing.Case("span_score", "chunks", lambda *_: (args, {})), dtype)


@pytest.mark.parametrize("labels", [10, 70])
def test_tiles_of_a_gpu(labels, chip):
    chip("sm_90")
    args = (*inputs((40, 11), 72, labels, dtype=torch.bfloat16), 12)
    options = {"dropout_p": 0.4, "seed": 5}
    check(testing.Case("span_score", "tiles", lambda *_: (args, options)), torch.bfloat16)
    check(
        testing.Case("span_pool", "tiles", lambda *_: ((*args[:2], *args[3:]), {})), torch.float16
    )


def test_dropout_mask_is_the_shared_one():
    """With one-hot labels and positive rows the logits show the mask itself."""
    rows = torch.ones(13, 24)
    labels = torch.eye(24).expand(2, 24, 24)
    cu = testing.cu_seqlens_of((4, 9))
    seed = torch.tensor([2**45 + 3])
    logits = fastenc.span_score(rows, rows, labels, cu, 6, dropout_p=0.4, seed=int(seed))
    keep = span_keep(torch.arange(13), 6, 24, 0.4, seed)
    exists = logits > float("-inf")
    torch.testing.assert_close(logits[exists], (2 * keep).float()[exists])


@pytest.mark.usefixtures("rows_alike")
def test_neighbours_do_not_matter():
    """A sequence between NaN neighbours is bit-equal to the sequence alone, gradients included."""
    start, end, labels, _ = inputs((3, 11, 2))
    alone = [x.clone().requires_grad_() for x in (start[3:14], end[3:14], labels[1:2])]
    packed = [torch.full_like(x, float("nan")) for x in (start, end, labels)]
    for x, y in zip(packed, alone, strict=True):
        x[slice(1, 2) if x.dim() == 3 else slice(3, 14)] = y.detach()
        x.requires_grad_()
    expected = fastenc.span_score(*alone, testing.cu_seqlens_of((11,)), 4)
    actual = fastenc.span_score(*packed, testing.cu_seqlens_of((3, 11, 2)), 4)
    assert torch.equal(actual[3:14], expected)
    g = torch.randn(expected.shape)
    wide = torch.zeros(actual.shape)
    wide[3:14] = g
    theirs = torch.autograd.grad(expected, alone, g)
    ours = torch.autograd.grad(actual, packed, wide)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x[slice(1, 2) if x.dim() == 3 else slice(3, 14)], y)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "labels"), [((0, 9, 1, 25), 3), ((17,), 40)])
def test_candidates_are_those_of_the_scores(lengths, labels, dtype):
    *tensors, cu = inputs(lengths, 33, labels, dtype=dtype)
    tensors = [x * 0.3 for x in tensors]
    bias = torch.linspace(1, -1, len(lengths) * labels).view(-1, labels).to(dtype)
    exact = span_candidates_ref(*(x.double() for x in tensors), cu, 6, 0.7, bias.double())
    with fastenc.record() as ran:
        *index, score = fastenc.span_candidates(*tensors, cu, 6, 0.7, bias)
    assert ran.calls == {"span_candidates": {"triton": 1}} and not ran.fallbacks
    assert all(x.dtype == torch.int64 for x in index) and score.dtype == torch.float32
    found = list(zip(*(x.tolist() for x in index), strict=True))
    assert found == sorted(set(found)) and (score > 0.7).all()
    theirs = dict(
        zip(zip(*(x.tolist() for x in exact[:3]), strict=True), exact[3].tolist(), strict=True)
    )
    ours = dict(zip(found, score.tolist(), strict=True))
    assert len(ours.keys() & theirs.keys()) > 5
    # 16-bit products round each row once: a score moves by its rounding, no more.
    slack = 1e-5 if dtype == torch.float32 else 2e-2
    for key in ours.keys() | theirs.keys():
        if key in ours and key in theirs:
            assert abs(ours[key] - theirs[key]) < slack, key
        else:
            assert abs((ours | theirs)[key] - 0.7) < slack, key
    again = fastenc.span_candidates(*tensors, cu, 6, 0.7, bias)
    assert all(torch.equal(a, b) for a, b in zip((*index, score), again, strict=True))


def test_candidates_at_the_ends():
    args = inputs((3, 1), 4)
    word, width, _, _ = fastenc.span_candidates(*args, 5, 0.0)
    assert len(word) == (6 + 1) * 3
    assert (word + width < torch.where(word < 3, 3, 4)).all()
    assert all(len(x) == 0 for x in fastenc.span_candidates(*args, 5, 1.0))
    assert torch.equal(fastenc.span_candidates(*args, sys.maxsize, 0.0)[1], width)
    args[0][1] = float("nan")
    assert 1 not in fastenc.span_candidates(*args, 3, 0.0)[0].tolist()


@pytest.mark.parametrize(("lengths", "labels"), [((), 3), ((0, 0), 3), ((4,), 0)])
def test_nothing_to_score(lengths, labels):
    *tensors, cu = inputs(lengths, labels=labels)
    leaves = [x.requires_grad_() for x in tensors]
    bias = torch.zeros(len(lengths), labels, requires_grad=True)
    fastenc.span_score(*leaves, cu, 2, bias).sum().backward()
    assert all(x.grad is not None and (x.grad == 0).all() for x in (*leaves, bias))
    fastenc.span_pool(*leaves[:2], cu, 2).sum().backward()
    assert all(x.shape == (0,) for x in fastenc.span_candidates(*tensors, cu, 2, 0.1))


def test_rows_far_apart():
    """Words 2**30 elements apart: offsets past 32 bits."""
    far = torch.empty(2 * (2**30 + 64) + 64, dtype=torch.bfloat16)
    x = far.as_strided((3, 64), (2**30 + 64, 1))
    x.copy_(torch.randn(3, 64))
    labels, cu = torch.randn(1, 4, 64).bfloat16(), testing.cu_seqlens_of((3,))
    near = x.contiguous()
    assert torch.equal(
        fastenc.span_score(x, x, labels, cu, 2), fastenc.span_score(near, near, labels, cu, 2)
    )
    assert torch.equal(fastenc.span_pool(x, x, cu, 2), fastenc.span_pool(near, near, cu, 2))


@pytest.mark.parametrize("op", ["span_pool", "span_score", "span_candidates"])
def test_opcheck(op):
    start, end, labels, cu = inputs((3, 0, 6))
    start.requires_grad_()
    args = {
        "span_pool": (start, end, cu, 4),
        "span_score": (start, end, labels, cu, 4, torch.randn(3, 3), 0.2, torch.tensor([3])),
        "span_candidates": (start.detach(), end, labels, cu, 4, 0.3, torch.randn(3, 3)),
    }[op]
    results = torch.library.opcheck(getattr(torch.ops.fastenc_triton, f"{op}_fwd").default, args)
    assert set(results.values()) == {"SUCCESS"}, results
