"""Disentangled attention: parity, tiles past each other's edges, no leakage, repeats."""

import pytest
import torch
from test_interpreted_parity import check

import fastenc
from fastenc import testing

CASES = [
    (case, dtype)
    for i, case in enumerate(testing.cases("disentangled_attention", "small"))
    for dtype in (torch.float32, testing.DTYPES[1 + i % 2])
]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_parity(case, dtype):
    check(case, dtype)


def inputs(lengths, heads=1, head_dim=16, buckets=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(sum(lengths), 3, heads, head_dim, generator=g).to(dtype).unbind(1)
    tables = torch.randn(2, heads, 2 * buckets, head_dim, generator=g).to(dtype)
    return q, k, v, *tables, testing.cu_seqlens_of(lengths), max([1, *lengths])


@pytest.mark.parametrize("head_dim", [1, 33, 96])
@pytest.mark.parametrize(("buckets", "far"), [(8, 20), (4, 6), (7, 0)])
def test_head_dims_and_buckets(head_dim, buckets, far):
    """Sequences past the radius: every distance is clamped in the farthest tiles."""
    args = inputs((2, 45), head_dim=head_dim, buckets=buckets)
    options = {"buckets": buckets, "max_positions": far}
    case = testing.Case("disentangled_attention", "dims", lambda *_: (args, options))
    check(case, torch.float32)


def test_tiles_of_a_gpu(chip):
    chip("sm_90")
    args = inputs((70, 129), head_dim=64, buckets=32, dtype=torch.bfloat16)
    options = {"buckets": 32, "max_positions": 80, "dropout_p": 0.2, "seed": -(2**40) - 1}
    case = testing.Case("disentangled_attention", "tiles", lambda *_: (args, options))
    check(case, torch.bfloat16)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_any_scale(scale):
    args = inputs((19,))
    options = {"buckets": 8, "max_positions": 20, "scale": scale}
    case = testing.Case("disentangled_attention", "scale", lambda *_: (args, options))
    check(case, torch.float32)


def run(args):
    leaves = [x.clone().requires_grad_() for x in args[:5]]
    out = fastenc.disentangled_attention(*leaves, *args[5:], buckets=8, max_positions=20)
    g = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def test_repeats_are_bit_equal_and_inputs_left_alone():
    args = inputs((3, 0, 38), heads=2)
    before = [x.clone() for x in args[:5]]
    first, second = run(args), run(args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=False))


@pytest.mark.usefixtures("rows_alike")
def test_neighbours_do_not_matter():
    *tensors, _, _ = inputs((5, 20, 3))
    alone = [x[5:25].clone() for x in tensors[:3]]
    for x, y in zip(tensors, alone, strict=False):
        x.fill_(float("nan"))[5:25] = y
    options = {"buckets": 8, "max_positions": 20}
    cu, own = testing.cu_seqlens_of((5, 20, 3)), testing.cu_seqlens_of((20,))
    packed = fastenc.disentangled_attention(*tensors, cu, 20, **options)
    single = fastenc.disentangled_attention(*alone, *tensors[3:], own, 20, **options)
    assert torch.equal(packed[5:25], single)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_empty(lengths):
    q, k, v, pk, pq, cu, _ = inputs(lengths)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, pk, pq)]
    out = fastenc.disentangled_attention(*leaves, cu, 1, buckets=8, max_positions=20)
    out.sum().backward()
    assert out.shape == q.shape and (leaves[3].grad == 0).all() and (leaves[4].grad == 0).all()


def test_opcheck():
    q, k, v, pk, pq, cu, longest = inputs((3, 14))
    from fastenc.ops._disentangled_ref import relative_index

    args = (q.requires_grad_(), k, v, pk, pq, relative_index(8, 20), cu, longest, 0.2, 0.0, None)
    op = torch.ops.fastenc_triton.disentangled_attention_fwd.default
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_heads_past_the_registers_are_refused():
    with pytest.raises(NotImplementedError, match="head_dim up to 128, got 129"):
        run(inputs((3,), head_dim=129))
