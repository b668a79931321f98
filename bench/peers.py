"""The peers of the end-to-end benchmarks: each runs one transformers model its own way.

A peer is built once from a transformers model (weights shared where the peer can) and then called
with padded ``input_ids`` and ``attention_mask`` on the CPU; it returns the last hidden state.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Runner = Callable[[Tensor, Tensor], Tensor]


def transformers_with(attention: str) -> Callable[[torch.nn.Module, Path], Runner]:
    def build(model, folder):
        model = type(model).from_pretrained(folder, attn_implementation=attention).eval()
        return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state

    return build


def torch_compile(model, folder) -> Runner:
    model = type(model).from_pretrained(folder, attn_implementation="sdpa").eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True)
    return lambda ids, mask: compiled(input_ids=ids, attention_mask=mask).last_hidden_state


def fastenc_model(model, folder) -> Runner:
    import fastenc

    ours = {"modernbert": "ModernBertModel", "bert": "BertModel"}[model.config.model_type]
    model = getattr(fastenc, ours).from_pretrained(folder).eval()
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state


def fastenc_prepacked(model, folder) -> Runner:
    import fastenc

    model = fastenc.accelerate(type(model).from_pretrained(folder).eval(), prepack=True)
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state


class _LastHiddenState(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _exported(model: torch.nn.Module, folder: Path) -> Path:
    """The ONNX file of the model, made once a folder."""
    path = folder / "model.onnx"
    if path.exists():
        return path
    model = _LastHiddenState(
        type(model).from_pretrained(folder, attn_implementation="eager").eval()
    )
    ids = torch.ones(2, 24, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            dynamo=True,
            verbose=False,
        )
    return path


def onnx_runtime(model, folder) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(_exported(model, folder)), options, providers=["CPUExecutionProvider"]
    )

    def run(ids, mask):
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def openvino_runtime(model, folder) -> Runner:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(str(_exported(model, folder)), "CPU", settings)

    def run(ids, mask):
        return torch.from_numpy(copy.copy(compiled([ids.numpy(), mask.numpy()])[0]))

    return run


PEERS: dict[str, Callable[[torch.nn.Module, Path], Runner]] = {
    "fastenc": fastenc_model,
    "fastenc prepacked": fastenc_prepacked,
    "transformers sdpa": transformers_with("sdpa"),
    "transformers eager": transformers_with("eager"),
    "transformers torch.compile": torch_compile,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino_runtime,
}
