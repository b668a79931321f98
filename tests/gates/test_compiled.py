"""The default launches for sm_80 and sm_90, compiled and judged; each gate is seen to fail once."""

import dataclasses
import functools
import importlib
import itertools

import compiling
import launches
import pytest
import torch
from compiling import compile_calls, faults

from fastenc.triton_kernels import (
    _common,
    add_layer_norm,
    geglu,
    rope,
    span_pool,
    varlen_attention,
)
from fastenc.triton_kernels import disentangled_attention_launch as disentangled
from fastenc.triton_kernels import varlen_attention_launch as choose
from fastenc.triton_kernels.varlen_attention_launch import Launch, Need

BF16 = torch.bfloat16
bind = functools.partial

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
    """Compiled for real, whatever is on record; where something is, it says the same."""
    kernels = compile_calls(chip, [call])
    report(kernels)
    sixteen_bit = dtype_of(call) != torch.float32
    found = {k.name: faults(k, sixteen_bit) for k in kernels}
    assert not any(found.values()), found
    readings = compiling.record_of(chip).readings
    known = {k.name: readings.get(k.key, k.reading) for k in kernels}
    assert known == {k.name: k.reading for k in kernels}


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


def specialisations(chip: str, calls) -> set[tuple[str, str]]:
    """The kernels that Triton would build for ``calls``, by its own keys; none is built."""
    found = set()

    def launch(kernel, grid, *args, **options):
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        compiling.build(kernel, grid, args, options, lambda key: not found.add((name, key)))

    with compiling.target(chip, launch):
        for call in calls:
            call()
    return found


BATCHES = [
    launches.Batch(*sizes)
    for sizes in ((1, 1, 1), (4099, 16, 777), (17, 3, 16), (8192, 500, 8192), (16, 1, 16))
]
SHARING = [
    *(call for calls in launches.default_calls().values() for call in calls),
    *(bind(launches.call_segment_pool, 768, BF16, mode) for mode in ("max", "cls", "last")),
    bind(launches.call_add_layer_norm, 16384, BF16, True, True),
    bind(launches.call_span_score, 2048, 1, BF16),
    bind(launches.call_span_score, 2048, 25, BF16, dropout=True),
    bind(launches.call_token_score, 2048, 512, 25, BF16, dropout=True),
    bind(launches.call_attention, 64, BF16, launches.GLOBAL, bias=True),
    bind(launches.call_disentangled, 64, BF16, dropout=True),
]


@pytest.mark.parametrize("call", SHARING, ids=launches.name_of)
def test_batches_share_their_kernels(call):
    """total_tokens, num_seqs and max_seqlen: 1, multiples of 16, and neither."""
    first = specialisations("sm_90", [call])
    every = specialisations("sm_90", [bind(call, batch=batch) for batch in BATCHES])
    assert first and every == first


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


ATTENTION = ("forward", "windowed_forward", "backward", "windowed_backward", "bias_gradient")
WINDOWS = (launches.GLOBAL, launches.LOCAL, launches.WIDE, (128, 128), (8, 8), (0, 0))
FLAGS = ({}, {"rope": True}, {"bias": True})


def possible_launches(chip) -> set[tuple]:
    """(chooser, launch) of every need; of the row kernels' sizes those of encoders."""
    found = set()

    def ask(module, name, *what):
        chosen = getattr(module, name)(*what, chip)
        chosen = chosen if isinstance(chosen, tuple) else (chosen,)
        found.update((module.__name__, name, launch) for launch in chosen)

    both = (torch.float32, BF16)
    dims, tosses = (8, 32, 64, 80, 96, 128, 256), (False, True)
    for head_dim, dtype, dropout in itertools.product(dims, both, tosses):
        for window, flags in itertools.product(WINDOWS, FLAGS):
            for name in ATTENTION if "bias" in flags else ATTENTION[:-1]:
                ask(choose, name, Need(head_dim, dtype, *window, dropout=dropout, **flags))
        for terms in (0, 1, 2) if head_dim <= disentangled.MAX_HEAD_DIM else ():
            for name in ("forward", "backward", "tables") if terms else ("forward", "backward"):
                ask(disentangled, name, disentangled.Need(head_dim, dtype, terms, dropout))
    for dtype in both:
        for size in (1100, 1152, 1536, 2624, 3072):
            ask(geglu, "candidates", size, dtype)
        for size in (256, 384, 768, 1000, 1024, 2048, 3000, 4096):
            ask(add_layer_norm, "candidates", size, dtype)
        for heads, head_dim in itertools.product((6, 8, 12, 16, 20), (32, 64, 96, 128)):
            ask(rope, "candidates", heads, head_dim, dtype)
    return found


@pytest.mark.parametrize("name", compiling.TARGETS)
def test_grid_reaches_every_launch(name, monkeypatch):
    """Of all that the choosers can return for attention and the row kernels."""
    possible = possible_launches(_common.CHIPS[name])
    reached = set()
    for module, chooser in {(module, chooser) for module, chooser, _ in possible}:
        before = getattr(importlib.import_module(module), chooser)

        def noted(*what, module=module, chooser=chooser, before=before):
            chosen = before(*what)
            for launch in chosen if isinstance(chosen, tuple) else (chosen,):
                reached.add((module, chooser, launch))
            return chosen

        monkeypatch.setattr(f"{module}.{chooser}", noted)
    with compiling.target(name, lambda *_, **__: None, every_candidate=True):
        for call in launches.all_calls():
            call()
    assert not possible - reached


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


def test_gate_sees_another_compilation(monkeypatch):
    """A kernel that Triton may specialise for the batch, and a constant that another call has."""
    call = bind(launches.call_span_pool, 2048, BF16)
    batches = [bind(call, batch=batch) for batch in BATCHES]
    monkeypatch.setattr(span_pool._forward_kernel.params[4], "do_not_specialize", False)
    assert len(specialisations("sm_90", batches)) > len(specialisations("sm_90", [call]))
