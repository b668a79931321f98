"""fastenc: encoder models without padding, on hand-written kernels."""

from fastenc.ops import *  # noqa: F403
from fastenc.ops import __all__ as _ops

__version__ = "0.1.0"
__all__ = [*_ops]
