"""What holds beyond parity: no leakage, no order, no writes to inputs, one dropout mask."""

import json

import pytest
import torch

import fastenc
from fastenc import testing
from fastenc.ops._philox import keep_mask

LENGTHS = (5, 0, 19, 1, 34)
WINDOWS = ((-1, -1), (4, 4), (40, 3))


def attend(x, cu, window, **options):
    q, k, v = x.unbind(1)
    longest = max([1, *cu.diff().tolist()])
    return fastenc.varlen_attention(q, k, v, cu, longest, window_size=window, **options)


def rope_attend(x, cu, window):
    tables = testing.rope_tables(64, x.shape[-1])
    return fastenc.rope_varlen_attention(x, *tables, cu, 64, window_size=window)


def with_gradient(fn, x, *args):
    x = x.detach().clone().requires_grad_()
    y = fn(x, *args)
    g = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (dx,) = torch.autograd.grad(y, x, g)
    return y.detach(), dx, g


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("fn", [attend, rope_attend])
def test_neighbours_do_not_matter(fn, window):
    """A sequence between NaN neighbours is bit-equal to the sequence alone, gradient included."""
    cu = testing.cu_seqlens_of(LENGTHS)
    x = torch.full((sum(LENGTHS), 3, 2, 16), float("nan"))
    alone = torch.randn(19, 3, 2, 16)
    x[5:24] = alone
    y, dx, g = with_gradient(fn, x, cu, window)
    single = alone.clone().requires_grad_()
    expected = fn(single, testing.cu_seqlens_of((19,)), window)
    assert torch.equal(y[5:24], expected)
    (dexpected,) = torch.autograd.grad(expected, single, g[5:24])
    assert torch.equal(dx[5:24], dexpected)


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("fn", [attend, rope_attend])
def test_order_of_sequences_does_not_matter(fn, window):
    order = (4, 1, 0, 3, 2)
    x = torch.randn(sum(LENGTHS), 3, 1, 16)
    rows = torch.arange(sum(LENGTHS)).split(LENGTHS)
    permuted = torch.cat([rows[i] for i in order])
    y = fn(x, testing.cu_seqlens_of(LENGTHS), window)
    z = fn(x[permuted], testing.cu_seqlens_of([LENGTHS[i] for i in order]), window)
    assert torch.equal(y[permuted], z)


def test_window_wider_than_the_sequence_is_no_window():
    x = torch.randn(30, 3, 1, 16)
    cu = testing.cu_seqlens_of((12, 18))
    wide = attend(x, cu, (18, 18))
    torch.testing.assert_close(attend(x, cu, (-1, -1)), wide)
    torch.testing.assert_close(attend(x, cu, (10**9, 10**9)), wide)


@pytest.mark.parametrize("mode", ["mean", "max", "cls", "last"])
def test_pooling_ignores_neighbours_and_order(mode):
    x = torch.randn(sum(LENGTHS), 40)
    cu = testing.cu_seqlens_of(LENGTHS)
    rows = fastenc.segment_pool(x, cu, mode)
    for i, part in enumerate(x.split(LENGTHS)):
        alone = fastenc.segment_pool(part, testing.cu_seqlens_of((len(part),)), mode)
        assert torch.equal(rows[i], alone[0])


def test_maximum_takes_nan_and_first_occurrence():
    x = torch.zeros(40, 3)
    x[:, 1] = float("-inf")
    x[[7, 20], 2] = float("nan")
    cu = testing.cu_seqlens_of((3, 0, 37))
    out, index = torch.ops.fastenc_triton.segment_pool_fwd(x, cu, "max")
    assert index.tolist() == [[0, 0, 0], [-1, -1, -1], [3, 3, 7]]
    assert out[0].tolist() == [0, float("-inf"), 0] and out[1].tolist() == [0, 0, 0]
    assert out[2, 2].isnan() and out[2, :2].tolist() == [0, float("-inf")]


@pytest.mark.parametrize("window", [(-1, -1), (5, 5)])
@pytest.mark.parametrize("seed", [0, 11, -7, 2**45 + 3])
@pytest.mark.parametrize("p", [0.2, 0.75])
def test_dropout_mask_is_the_shared_one(window, seed, p):
    """With equal scores and one-hot values the output shows the mask itself."""
    lengths = (9, 30)
    q = torch.zeros(39, 2, 32)
    v = torch.cat([torch.eye(32)[:n] for n in lengths]).unsqueeze(1).expand(-1, 2, -1)
    cu = testing.cu_seqlens_of(lengths)
    out = fastenc.varlen_attention(q, q, v, cu, 30, window, dropout_p=p, seed=seed)
    for start, n in ((0, 9), (9, 30)):
        keep = keep_mask(torch.arange(start, start + n), n, 2, p, torch.tensor([seed]))
        distance = torch.arange(n) - torch.arange(n).view(-1, 1)
        seen = (distance.abs() <= window[0]) | (window[0] < 0)
        shown = out[start : start + n, :, :n].transpose(0, 1) != 0
        assert torch.equal(shown, keep & seen)


@pytest.mark.parametrize("window", [(-1, -1), (3, 3)])
def test_rows_without_a_key_are_zeros(window):
    q, k, v = (torch.randn(20, 1, 16) for _ in range(3))
    table = torch.full((1, 257), float("-inf"))
    cu = testing.cu_seqlens_of((7, 13))
    shape = (cu, 13, *window, 0.25, 0.0, None, table)
    out, lse = torch.ops.fastenc_triton.varlen_attention_fwd(q, k, v, *shape)
    assert (out == 0).all() and (lse == float("-inf")).all()
    grads = torch.ops.fastenc_triton.varlen_attention_bwd(
        torch.ones_like(q), None, q, k, v, out, lse, *shape
    )
    assert all((g == 0).all() for g in grads)


def every_call():
    """One call of each raw op: (name, arguments)."""
    cu = testing.cu_seqlens_of((3, 14))
    qkv = torch.randn(17, 3, 2, 16)
    cos, sin = testing.rope_tables(20, 16)
    x, row = torch.randn(17, 24), torch.randn(24)
    attention = (cu, 14, -1, -1, 0.25, 0.0, None)
    return {
        "geglu": (x, "gelu"),
        "rope": (qkv[:, :2], cos, sin, torch.arange(17)),
        "add_layer_norm": (x, x + 1, row, row, 1e-5),
        "segment_pool": (x, cu, "max"),
        "varlen_attention": (*qkv.unbind(1), *attention, torch.randn(2, 257)),
        "rope_varlen_attention": (qkv, cos, sin, *attention),
    }


@pytest.mark.parametrize("name", every_call())
def test_inputs_are_left_alone_and_runs_are_bit_equal(name):
    args = every_call()[name]
    tensors = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    before = [t.clone() for t in tensors]

    def run():
        inputs = [
            a.detach().requires_grad_()
            if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for a in args
        ]
        if name in ("rope", "rope_varlen_attention"):
            inputs[1:3] = args[1:3]
        outputs = getattr(torch.ops.fastenc_triton, f"{name}_fwd")(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [o for o in outputs if o.requires_grad and o.numel()]
        inputs = [a for a in inputs if isinstance(a, torch.Tensor) and a.requires_grad]
        return [*wanted, *torch.autograd.grad(wanted, inputs, [o.detach() + 1 for o in wanted])]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert not any(t.isnan().any() for t in first)


@pytest.mark.parametrize("name", every_call())
def test_opcheck(name):
    args = [
        a.requires_grad_()
        if isinstance(a, torch.Tensor) and a.is_floating_point() and i == 0
        else a
        for i, a in enumerate(every_call()[name])
    ]
    if name == "rope":
        args[0] = args[0].detach().clone().requires_grad_()
    op = getattr(torch.ops.fastenc_triton, f"{name}_fwd").default
    assert set(torch.library.opcheck(op, tuple(args)).values()) == {"SUCCESS"}


def test_rope_in_place():
    from fastenc.triton_kernels.rope import rotate

    qkv = torch.randn(9, 3, 2, 32)
    before = qkv.clone()
    cos, sin = testing.rope_tables(9, 32)
    positions = torch.arange(9)
    expected = fastenc.rope(qkv[:, :2], cos, sin, positions)
    rotate(qkv[:, :2], cos, sin, positions, qkv[:, :2])
    assert torch.equal(qkv[:, :2], expected) and torch.equal(qkv[:, 2], before[:, 2])


def strided(shape, strides, dtype=torch.bfloat16):
    """A tensor of far apart rows: address space is reserved, memory only where it is touched."""
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    return torch.empty(span, dtype=dtype).as_strided(shape, strides)


def test_offsets_past_32_bits_in_rows():
    x = strided((3, 64), (2**30 + 64, 1))
    x.copy_(torch.randn(3, 64))
    assert torch.equal(fastenc.geglu(x), fastenc.geglu(x.contiguous()))
    w = torch.ones(64, dtype=x.dtype)
    for a, b in zip(
        fastenc.add_layer_norm(x, x, w), fastenc.add_layer_norm(x.contiguous(), x.contiguous(), w),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)
    cu = testing.cu_seqlens_of((1, 2))
    assert torch.equal(fastenc.segment_pool(x, cu), fastenc.segment_pool(x.contiguous(), cu))
    cos, sin = testing.rope_tables(3, 64)
    heads = x.view(3, 1, 64)
    args = cos, sin, torch.arange(3)
    assert torch.equal(fastenc.rope(heads, *args), fastenc.rope(heads.contiguous(), *args))


@pytest.mark.parametrize("window", [(-1, -1), (3, 3)])
def test_offsets_past_32_bits_in_attention(window):
    """520 tokens, 2**22 elements apart: the last ones lie past 2**31."""
    tokens = 520
    x = strided((tokens, 3, 1, 16), (2**22, 16, 16, 1))
    x.copy_(torch.randn(tokens, 3, 1, 16))
    cu = testing.cu_seqlens_of((26,) * 20)
    y = attend(x, cu, window)
    assert torch.equal(y, attend(x.contiguous(), cu, window))


def test_tokens_too_far_apart_for_a_tile_are_copied():
    x = strided((5, 3, 1, 16), (2**29, 16, 16, 1))
    x.copy_(torch.randn(5, 3, 1, 16))
    cu = testing.cu_seqlens_of((5,))
    assert torch.equal(attend(x, cu, (-1, -1)), attend(x.contiguous(), cu, (-1, -1)))


def test_views_and_misaligned_pointers():
    base = torch.randn(11 * 3 * 2 * 16 + 3)[3:].view(11, 3, 2, 16)
    cu = testing.cu_seqlens_of((4, 7))
    for window in WINDOWS:
        assert torch.equal(attend(base, cu, window), attend(base.clone(), cu, window))
        swapped = base.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
        assert torch.equal(attend(swapped, cu, window), attend(base, cu, window))
    sliced = torch.randn(6, 80)[:, ::2]
    assert torch.equal(fastenc.geglu(sliced), fastenc.geglu(sliced.contiguous()))


def test_empty_batches():
    for lengths in ((), (0, 0)):
        cu = testing.cu_seqlens_of(lengths)
        x = torch.randn(0, 3, 2, 16, requires_grad=True)
        y = attend(x, cu, (-1, -1))
        y.sum().backward()
        assert y.shape == (0, 2, 16) and x.grad.shape == x.shape
        pooled = fastenc.segment_pool(torch.randn(0, 8), cu, "max")
        assert pooled.shape == (len(lengths), 8) and (pooled == 0).all()
    w = torch.randn(8, requires_grad=True)
    fastenc.add_layer_norm(torch.randn(0, 8), None, w)[0].sum().backward()
    assert (w.grad == 0).all()


def test_tile_list_is_longest_first_and_complete(chip):
    from fastenc.triton_kernels._attention import schedule

    lengths = (3, 100, 0, 33, 100, 32, 1)
    tiles = schedule(testing.cu_seqlens_of(lengths), sum(lengths), 32)
    start, length, first = tiles.tolist()
    used = sum(-(-n // 32) for n in lengths)
    assert length[used:] == [0] * (len(length) - used) and first[used:] == length[used:]
    assert length[:used] == sorted(length[:used], reverse=True)
    starts = testing.cu_seqlens_of(lengths).tolist()
    expected = {(s, n, t) for s, n in zip(starts, lengths, strict=False) for t in range(0, n, 32)}
    assert set(zip(start[:used], length[:used], first[:used], strict=True)) == expected


def test_autotune_keeps_the_fastest_and_remembers_it(monkeypatch, tmp_path):
    from fastenc.triton_kernels import _common
    from fastenc.triton_kernels.geglu import Launch

    choices = tuple(Launch(1, width, 4) for width in (16, 32, 64))
    ran, device = [], torch.device("cpu")
    key = ("geglu", 64)
    _common.run_chosen(key, device, choices, ran.append)
    assert ran == [choices[0]]
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("FASTENC_AUTOTUNE", "1")
    monkeypatch.setenv("FASTENC_AUTOTUNE_CACHE", str(path))
    monkeypatch.setattr(_common, "_tuned", {})
    monkeypatch.setattr(_common, "_tuned_file", None)
    monkeypatch.setattr(_common, "_may_time", lambda device: True)
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(_common.triton.testing, "do_bench", lambda fn: next(times))
    _common.run_chosen(key, device, choices, ran.append)
    assert ran[-1] == choices[1]
    assert json.loads(path.read_text()) == {"geglu|64": vars(choices[1])}
    monkeypatch.setattr(_common, "_tuned", {})
    monkeypatch.setattr(_common, "_tuned_file", None)
    _common.run_chosen(key, device, choices, ran.append)  # from the file: no time is left to take
    assert ran[-1] == choices[1]
