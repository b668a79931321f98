"""pytest bench/bench_token_score.py: time, floor / measured, beside plain PyTorch."""

import pytest
import torch

from bench import op_bench
from fastenc import testing


@pytest.mark.parametrize("case", list(testing.cases("token_score", "bench")), ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["fastenc", "pytorch"])
def test_token_score(benchmark, name, dtype, backward, case):
    op_bench.bench(benchmark, case, dtype, backward, op_bench.implementations("token_score")[name])
