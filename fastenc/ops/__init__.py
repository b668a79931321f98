"""fastenc's ops: hand-written kernels as ``torch.ops.fastenc.*``, one file an op."""

from fastenc.ops import dropout as _dropout  # noqa: F401  ops that only fastenc.nn calls: defined
from fastenc.ops import linear as _linear  # noqa: F401  with the others, so that backends() has them
from fastenc.ops._registry import backends, debug_checks, record, use_backend
from fastenc.ops.add_layer_norm import add_layer_norm
from fastenc.ops.disentangled_attention import disentangled_attention
from fastenc.ops.flash_attn import flash_attn_varlen_func
from fastenc.ops.geglu import geglu
from fastenc.ops.rope import rope
from fastenc.ops.rope_varlen_attention import rope_varlen_attention
from fastenc.ops.segment_pool import segment_pool
from fastenc.ops.span_candidates import span_candidates
from fastenc.ops.span_pool import span_pool
from fastenc.ops.span_score import span_score
from fastenc.ops.token_score import token_score
from fastenc.ops.varlen_attention import varlen_attention

__all__ = [
    "add_layer_norm",
    "backends",
    "debug_checks",
    "disentangled_attention",
    "flash_attn_varlen_func",
    "geglu",
    "record",
    "rope",
    "rope_varlen_attention",
    "segment_pool",
    "span_candidates",
    "span_pool",
    "span_score",
    "token_score",
    "use_backend",
    "varlen_attention",
]
