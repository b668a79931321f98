"""Every launch that the choosers can return, for every target; slow, part of ``make gates``.

What is on record (readings/) is not compiled again; what is not is compiled and put there. Two
processes of compile_all.py do that part in half the time.
"""

import launches
import pytest
import torch
from compile_all import distinct_launches
from compiling import TARGETS, compile_calls, faults, record_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("call", launches.all_calls(), ids=launches.name_of)
def test_every_launch(call, chip, report):
    dtype = next(a for a in call.args if isinstance(a, torch.dtype))
    vectors = launches.aligned(call)
    kernels = compile_calls(chip, [call], every_candidate=True, on_record=True)
    report(kernels)
    found = [(k.name, k.settings, faults(k, dtype != torch.float32, vectors)) for k in kernels]
    assert not any(texts for *_, texts in found), [f for f in found if f[2]]


@pytest.mark.parametrize("chip", TARGETS)
def test_record_is_of_these_launches(chip):
    """After the tests above: nothing is missing, and nothing is kept that is launched no more."""
    assert set(record_of(chip).readings) == set(distinct_launches(chip)), (
        "run python tests/gates/compile_all.py"
    )
