"""The kernels of token_score: parity, passes of the backward, no leakage, one mask."""

import pytest
import torch
from test_interpreted_parity import check

import fastenc
from fastenc import testing
from fastenc.ops._token_ref import token_keep


@pytest.mark.parametrize("case", testing.cases("token_score", "small"), ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_parity(case, dtype):
    check(case, dtype)


def made(lengths, d=20, r=40, labels=3, dtype=torch.float32, **options):
    """A case of the grid's kind: no rounding takes a hidden element across the kink of the ReLU."""
    from fastenc._gliner_cases import _token_score

    make = _token_score(lengths, d, r, labels, True, False)
    args, bias = make(dtype)
    return testing.Case("token_score", "made", lambda *_: (args, {**bias, **options}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [1, 4])
def test_passes_of_the_backward(monkeypatch, dtype, words):
    """Workspaces smaller than a word's rows and than a sequence's."""
    from fastenc.triton_kernels import token_score_bwd

    monkeypatch.setattr(token_score_bwd, "WORKSPACE", words * 5 * 36)
    case = made((3, 0, 6), 10, 36, 5, dtype, dropout_p=0.3, seed=-(2**40) - 3)
    check(case, dtype)


@pytest.mark.parametrize("labels", [1, 25])
def test_tiles_of_a_gpu(labels, chip):
    chip("sm_90")
    case = made((9, 4), 72, 136, labels, torch.bfloat16, dropout_p=0.4, seed=5)
    check(case, torch.bfloat16)


def test_dropout_mask_is_the_shared_one():
    """With an output a hidden element, the scores show the mask itself."""
    token, factor = torch.ones(7, 12), torch.zeros(7, 4)
    label, label_factor = torch.zeros(2, 2, 12), torch.zeros(2, 2, 4)
    cu, seed = testing.cu_seqlens_of((3, 4)), torch.tensor([2**45 + 3])
    keep = token_keep(torch.arange(7), 2, 12, 0.4, seed).float()
    for r in range(0, 12, 3):
        outs = torch.eye(12)[r : r + 3]
        args = (token, label, factor, label_factor, torch.zeros(12, 4), outs, cu)
        scores = fastenc.token_score(*args, dropout_p=0.4, seed=int(seed))
        torch.testing.assert_close(scores, keep[..., r : r + 3])


@pytest.mark.usefixtures("rows_alike")
def test_neighbours_do_not_matter(monkeypatch):
    """A sequence between NaN neighbours is bit-equal to the sequence alone, gradients included."""
    from fastenc.triton_kernels import token_score_bwd

    monkeypatch.setattr(token_score_bwd, "WORKSPACE", 4 * 3 * 40)
    args, _ = made((3, 6, 2)).make(torch.float32)
    rows, shared = (slice(3, 9), slice(1, 2), slice(3, 9), slice(1, 2)), args[4:6]
    alone = [x[i].clone().requires_grad_() for x, i in zip(args[:4], rows, strict=True)]
    packed = [torch.full_like(x, float("nan")) for x in args[:4]]
    for x, y, i in zip(packed, alone, rows, strict=True):
        x[i] = y.detach()
        x.requires_grad_()
    expected = fastenc.token_score(*alone, *shared, testing.cu_seqlens_of((6,)))
    actual = fastenc.token_score(*packed, *shared, args[6])
    assert torch.equal(actual[3:9], expected)
    g = torch.randn(expected.shape)
    whole = torch.zeros(actual.shape)
    whole[3:9] = g
    theirs = torch.autograd.grad(expected, alone, g)
    ours = torch.autograd.grad(actual, packed, whole)
    for x, y, i in zip(ours, theirs, rows, strict=True):
        assert torch.equal(x[i], y)


@pytest.mark.parametrize(("lengths", "labels"), [((), 3), ((0, 0), 3), ((4,), 0)])
def test_nothing_to_score(lengths, labels):
    args, options = made(lengths, labels=labels).make(torch.float32)
    leaves = [x.requires_grad_() for x in (*args[:6], options["out_bias"])]
    fastenc.token_score(*leaves[:6], args[6], leaves[6]).sum().backward()
    assert all(x.grad is not None and (x.grad == 0).all() for x in leaves)


def test_opcheck():
    args, options = made((3, 0, 2), 4, 8, 2).make(torch.float32)
    args[0].requires_grad_()
    raw = (*args, options["out_bias"], 0.2, torch.tensor([3]))
    results = torch.library.opcheck(torch.ops.fastenc_triton.token_score_fwd.default, raw)
    assert set(results.values()) == {"SUCCESS"}, results
