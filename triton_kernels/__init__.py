"""fastenc's Triton kernels, one file an op; installed as ``fastenc.triton_kernels`` only."""

if __name__ != "fastenc.triton_kernels":
    raise ImportError(
        f"this package must be imported as fastenc.triton_kernels, not {__name__!r}: "
        "triton_kernels is the name of another project"
    )
