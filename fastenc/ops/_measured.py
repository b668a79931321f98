"""Where Triton was measured to be faster than the CUDA library: written by ``bench.choose``.

An entry is ((op, chip), ratio): ``op`` is served by Triton on GPUs of ``chip`` ("sm_90"), where the
CUDA library took ``ratio`` times as long. Empty until there are results of a GPU.
"""

FASTER_IN_TRITON: dict[tuple[str, str], float] = {}
