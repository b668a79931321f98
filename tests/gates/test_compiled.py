"""The default launches for sm_80 and sm_90, compiled and judged; each gate is seen to fail once."""

import dataclasses

import compiling
import launches
import pytest
import torch
from compiling import compile_calls, faults

from fastenc.triton_kernels import _common, geglu, varlen_attention
from fastenc.triton_kernels import varlen_attention_launch as choose
from fastenc.triton_kernels.varlen_attention_launch import Launch, Need

DEFAULT_CALLS = [
    pytest.param(op, call, id=f"{op}-{i}")
    for op, calls in launches.default_calls().items()
    for i, call in enumerate(calls)
]


def dtype_of(call) -> torch.dtype:
    return next(a for a in call.args if isinstance(a, torch.dtype))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("op", "call"), DEFAULT_CALLS)
def test_default_launches(op, call, chip, report):
    kernels = compile_calls(chip, [call])
    report(kernels)
    sixteen_bit = dtype_of(call) != torch.float32
    found = {k.name: faults(k, sixteen_bit) for k in kernels}
    assert not any(found.values()), found


def test_geglu_moves_16_bytes_at_a_time():
    """Exactly: two halves in and one out, three in and two out, of 16 elements a thread."""
    forward, backward = compile_calls("sm_90", [lambda: launches.call_geglu(1152, launches.BF16)])
    for kernel, loads, stores in ((forward, 4, 2), (backward, 6, 4)):
        assert kernel.count(r"LDG\..*") == kernel.count(r"LDG\.E(\..*)*\.128") == loads
        assert kernel.count(r"STG\..*") == kernel.count(r"STG\.E(\..*)*\.128") == stores


def test_windowed_kernels_are_single_pass():
    """No loop over keys, no rescaling: at most one exponential a score. No atomics backward."""
    call = launches.call_attention
    kernels = compile_calls("sm_90", [lambda: call(64, launches.BF16, launches.LOCAL)])
    assert {k.name for k in kernels} == {
        "windowed_attention_fwd.windowed_forward_kernel",
        "varlen_attention_bwd.backward_kernel",
    }
    (forward,) = (k for k in kernels if "fwd" in k.name)
    scores = 64 * 192 // 128
    assert scores * 0.9 < forward.count(r"MUFU\.EX2") <= scores
    (backward,) = (k for k in kernels if "bwd" in k.name)
    assert backward.count(r"(ATOM|RED)[GS]?(\..*)?") == 0


# ---- what may not cause another compilation ----------------------------------------------------


def specialisations(chip: str, calls) -> int:
    """How many kernels Triton would build for ``calls``, by its own cache keys."""
    kernels = {}

    def launch(kernel, grid, *args, **options):
        kernels[id(kernel)] = kernel
        kernel.warmup(*args, grid=grid, **options)

    with compiling.target(chip, launch):
        for call in calls:
            call()
    return sum(len(cache) for k in kernels.values() for cache, *_ in k.device_caches.values())


def attention_of(total: int, num_seqs: int, max_seqlen: int, window: tuple[int, int], rope: bool):
    qkv = torch.empty(total, 3, 12, 64, dtype=torch.bfloat16)
    cu = torch.zeros(num_seqs + 1, dtype=torch.int32)
    shape = (cu, max_seqlen, *window, 0.125, 0.0, None)
    if rope:
        from fastenc.triton_kernels import rope_varlen_attention as op

        tables = (torch.empty(8192, 32, dtype=torch.bfloat16),) * 2
        out, lse = op.rope_varlen_attention_fwd(qkv, *tables, *shape)
        op.rope_varlen_attention_bwd(out, None, qkv, *tables, out, lse, *shape)
    else:
        out, lse = varlen_attention.varlen_attention_fwd(*qkv.unbind(1), *shape, None)
        varlen_attention.varlen_attention_bwd(out, None, *qkv.unbind(1), out, lse, *shape, None)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("window", [launches.GLOBAL, launches.LOCAL])
def test_batches_share_their_kernels(window, rope):
    for kernel in clear_caches():
        kernel.device_caches.clear()
    batches = ((64, 1, 64), (1, 1, 1), (4099, 16, 777), (17, 3, 16), (8192, 500, 8192))
    first = specialisations("sm_90", [lambda: attention_of(*batches[0], window, rope)])
    every = specialisations(
        "sm_90", [lambda b=b: attention_of(*b, window, rope) for b in batches]
    )  # fmt: skip
    assert first == every


def clear_caches():
    """Every kernel of the package."""
    from fastenc.triton_kernels import (
        _attention,
        rope,
        varlen_attention_bias,
        varlen_attention_bwd,
        varlen_attention_fwd,
        windowed_attention_fwd,
    )

    for module in (
        _attention, rope, varlen_attention_bias, varlen_attention_bwd, varlen_attention_fwd,
        windowed_attention_fwd,
    ):  # fmt: skip
        yield from (x for x in vars(module).values() if hasattr(x, "device_caches"))


# ---- launches are plain data -------------------------------------------------------------------


@pytest.mark.parametrize("name", _common.CHIPS)
def test_launches_are_pure_and_frozen(name):
    chip = _common.CHIPS[name]
    for head_dim in (8, 64, 96, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            for flags in ({}, {"dropout": True}, {"bias": True}, {"rope": True}):
                for left, right in (launches.GLOBAL, launches.LOCAL, launches.WIDE):
                    need = Need(head_dim, dtype, left, right, **flags)
                    for chosen in (
                        choose.forward,
                        choose.windowed_forward,
                        choose.backward,
                        choose.windowed_backward,
                    ):
                        assert chosen(need, chip) == chosen(need, chip)
                        for launch in chosen(need, chip):
                            hash(launch)
                            with pytest.raises(dataclasses.FrozenInstanceError):
                                launch.block_m = 1
    assert geglu.candidates(1152, torch.bfloat16, chip)[0].block_c in (128, 256)


# ---- each gate fails when what it guards is broken ---------------------------------------------


def broken(monkeypatch, which: str, launch: Launch, window) -> list[str]:
    monkeypatch.setattr(choose, which, lambda need, chip: (launch,))
    call = launches.call_attention
    kernels = compile_calls("sm_90", [lambda: call(64, launches.BF16, window)])
    return [text for k in kernels for text in faults(k, True)]


@pytest.mark.slow
def test_gate_sees_spills(monkeypatch):
    texts = broken(monkeypatch, "backward", Launch(128, 128, 4, 1), launches.GLOBAL)
    assert any("spills" in text for text in texts)


@pytest.mark.slow
def test_gate_sees_too_much_shared_memory(monkeypatch):
    texts = broken(monkeypatch, "forward", Launch(128, 128, 8, 8), launches.GLOBAL)
    assert any("shared memory" in text for text in texts)


@pytest.mark.slow
def test_gate_sees_missing_matrix_instructions(monkeypatch):
    """wgmma needs 64 rows: 32 fall back to the older instruction."""
    texts = broken(monkeypatch, "forward", Launch(32, 64, 4, 2), launches.GLOBAL)
    assert any("HGMMA" in text for text in texts)


@pytest.mark.slow
def test_gate_sees_narrow_accesses():
    def misaligned():
        base = torch.empty(64 * 3 * 12 * 64 + 1, dtype=torch.bfloat16)
        q, k, v = base[1:].view(64, 3, 12, 64).unbind(1)
        shape = torch.zeros(2, dtype=torch.int32), 64, -1, -1, 0.125, 0.0, None, None
        varlen_attention.varlen_attention_fwd(q, k, v, *shape)
        x = torch.empty(64 * 2304 + 1, dtype=torch.bfloat16)[1:].view(64, 2304)
        geglu.geglu_fwd(x, "gelu")

    kernels = compile_calls("sm_90", [misaligned])
    for name in ("varlen_attention_fwd.forward_kernel", "geglu._forward_kernel"):
        (kernel,) = (k for k in kernels if k.name == name)
        assert any("16 bits" in text for text in faults(kernel, True)), name


@pytest.mark.slow
def test_gate_sees_tf32(monkeypatch):
    """The switch that users have, torch.backends.cuda.matmul.allow_tf32, reaches the kernels."""
    monkeypatch.setattr(_common, "tf32_allowed", lambda: True)
    call = launches.call_attention
    kernels = compile_calls("sm_80", [lambda: call(64, launches.FP32, launches.GLOBAL)])
    assert any("tf32" in text for k in kernels for text in faults(k, False))


def test_gate_sees_another_compilation():
    """The counter itself: a batch with another head_dim needs its own kernels."""
    for kernel in clear_caches():
        kernel.device_caches.clear()

    def attend(head_dim):
        q = torch.empty(64, 2, head_dim, dtype=torch.bfloat16)
        shape = torch.zeros(2, dtype=torch.int32), 64, -1, -1, 0.125, 0.0, None, None
        varlen_attention.varlen_attention_fwd(q, q, q, *shape)

    one = specialisations("sm_90", [lambda: attend(64)])
    assert specialisations("sm_90", [lambda: attend(64), lambda: attend(32)]) > one
