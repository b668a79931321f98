"""Every launch that the choosers can return, for every target; slow, part of ``make gates``."""

import launches
import pytest
import torch
from compiling import TARGETS, compile_calls, faults

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("call", launches.all_calls(), ids=launches.name_of)
def test_every_launch(call, chip, report):
    dtype = next(a for a in call.args if isinstance(a, torch.dtype))
    vectors = launches.aligned(call)
    kernels = compile_calls(chip, [call], every_candidate=True)
    report(kernels)
    found = [(k.name, k.settings, faults(k, dtype != torch.float32, vectors)) for k in kernels]
    assert not any(texts for *_, texts in found), [f for f in found if f[2]]
