"""pytest bench/bench_linear.py: linear layers, also prepacked, beside torch's (ModernBERT)."""

import functools

import pytest
import torch
from torch import nn

from bench import op_bench
from fastenc.nn import prepack
from fastenc.nn.linear import linear


@pytest.mark.parametrize("case", ["16x768x2304", "512x768x2304", "2048x768x2304", "2048x1152x768"])
@pytest.mark.parametrize("backward", [False], ids=["forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["fastenc", "fastenc prepacked", "pytorch"])
def test_linear(benchmark, name, dtype, backward, case):
    rows, inputs, outputs = map(int, case.split("x"))
    layer = nn.Sequential(nn.Linear(inputs, outputs, bias=False, dtype=dtype))
    if name == "fastenc prepacked":
        prepack(layer)
    run = layer if name == "pytorch" else functools.partial(linear, layer[0])
    x = torch.randn(rows, inputs, dtype=dtype)
    with torch.inference_mode():
        run(x)
        benchmark(run, x)
    flops = 2 * rows * inputs * outputs
    floor = flops / op_bench.ceilings()["sgemm"]
    spent = benchmark.stats.stats.median
    benchmark.extra_info.update(
        bytes=0, flops=flops, floor_us=floor * 1e6, fraction_of_floor=floor / spent
    )
