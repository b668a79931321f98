"""Accelerated models among the libraries they live with: PEFT, Trainer, DDP, compile, export."""

from __future__ import annotations

import copy
import os

import peft
import pytest
import test_accelerate_heads as heads
import test_bert
import test_modernbert
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from model_tests import at, check_gradients, check_trained, outputs_and_gradients, padded, telling
from torch import nn

import fastenc
from fastenc.nn import packed_forward_of
from fastenc.testing import assert_parity

BASES = {
    "ModernBert": lambda: transformers.ModernBertModel(
        test_modernbert.config_of(num_hidden_layers=2)
    ),
    "Bert": lambda: transformers.BertModel(
        transformers.BertConfig(**test_bert.TINY | {"num_hidden_layers": 2})
    ),
}


@pytest.fixture(params=BASES)
def reference(request) -> nn.Module:
    return telling(BASES[request.param]()).eval()


def inputs_of() -> dict:
    ids, mask = padded((23, 7, 1), 23, 99, "right")
    return {"input_ids": ids, "attention_mask": mask}


# ---- PEFT ----------------------------------------------------------------------------------------


def with_lora(model: nn.Module, **options) -> nn.Module:
    targets = "all-linear" if type(model).__name__[:4] == "Bert" else ["Wqkv", "Wo", "Wi"]
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config)


def lora_parity(wrapped: nn.Module, plain: nn.Module) -> None:
    """As check_model, on the parameters that adapters leave trainable."""
    inputs = inputs_of()
    real = inputs["attention_mask"] != 0
    with fastenc.record() as ran:
        _, actual = outputs_and_gradients(wrapped, inputs, real)
    assert ran.fallbacks == [] and "add_layer_norm" in ran.calls
    _, expected = outputs_and_gradients(plain, inputs, real)
    _, exact = outputs_and_gradients(copy.deepcopy(plain).double(), inputs, real)
    assert actual.keys() == expected.keys() and all("lora" in name for name in actual)
    check_gradients([actual], [expected], [exact])


def test_lora_is_exact_and_packed(reference):
    plain = with_lora(copy.deepcopy(reference)).eval()
    lora_parity(with_lora(fastenc.accelerate(copy.deepcopy(reference))).eval(), plain)
    lora_parity(fastenc.accelerate(with_lora(copy.deepcopy(reference)).eval()), plain)


def test_lora_and_gradient_checkpointing(reference):
    plain = with_lora(copy.deepcopy(reference))
    wrapped = fastenc.accelerate(copy.deepcopy(plain))
    for model in (plain, wrapped):
        model.base_model.model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        model.train()
    lora_parity(wrapped, plain)


def test_merging_adapters(reference):
    inputs = inputs_of()
    real = inputs["attention_mask"] == 1
    plain = with_lora(copy.deepcopy(reference)).eval()
    exact = copy.deepcopy(plain).double()(**inputs).last_hidden_state
    wrapped = with_lora(fastenc.accelerate(copy.deepcopy(reference))).eval()
    merged = wrapped.merge_and_unload()
    assert packed_forward_of(merged) is not None
    after, expected = (m(**inputs).last_hidden_state for m in (merged, plain.merge_and_unload()))
    assert_parity("merged", after[real], expected[real], exact[real])


def test_trained_norms_fall_back(reference):
    """An adapter on a layer that is fused away is never skipped."""
    slot = "mlp_norm" if isinstance(reference, transformers.ModernBertModel) else "LayerNorm"
    config = peft.LoraConfig(r=2, target_modules=["Wo", "query"][slot == "LayerNorm":][:1],
                             modules_to_save=[slot])  # fmt: skip
    wrapped = fastenc.accelerate(peft.get_peft_model(copy.deepcopy(reference), config)).eval()
    with fastenc.record() as ran:
        wrapped(**inputs_of())
    assert len(ran.fallbacks) == 1 and "ModulesToSaveWrapper" in ran.fallbacks[0]


# ---- training loops ------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        inputs = heads.inputs_of("ModernBertForSequenceClassification")
        self.rows = [{k: x[i % 4] for k, x in inputs.items()} for i in range(12)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


def test_trainer_for_three_steps(tmp_path):
    """Trainer's losses and weights are those of the plain model."""
    reference = heads.model_of("ModernBertForSequenceClassification")

    def train(model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-3, disable_tqdm=True,
            seed=0, gradient_checkpointing=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows())
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    before = dict(copy.deepcopy(reference).named_parameters())
    plain, exact = copy.deepcopy(reference), copy.deepcopy(reference).double()
    with fastenc.record() as ran:
        losses = train(fastenc.accelerate(reference))
    assert ran.fallbacks == [] and "rope_varlen_attention_bwd" in ran.calls
    losses, expected, true = (torch.tensor(x) for x in (losses, train(plain), train(exact)))
    assert len(losses) == 3
    assert_parity("losses", losses, expected, true)
    check_trained(*(dict(m.named_parameters()) for m in (reference, plain, exact)), before)


def seeded_model() -> nn.Module:
    torch.manual_seed(0)
    return fastenc.accelerate(telling(BASES["ModernBert"]()))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = seeded_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    ids, mask = padded((23, 7, 1, 12), 23, 99)
    half = slice(2 * rank, 2 * rank + 2)
    out = wrapped(ids[half], attention_mask=mask[half]).last_hidden_state
    out.square().sum().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, f"{folder}/gradients.pt")
    dist.barrier()
    # torch can deadlock when DDP's reducer is freed (gloo waits for the GIL): leave at once
    os._exit(0)


def test_ddp_gives_the_gradients_of_one_process(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    ids, mask = padded((23, 7, 1, 12), 23, 99)

    def gradients(model: nn.Module) -> dict:
        out = model(ids, attention_mask=mask).last_hidden_state[mask == 1]
        out.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    reference = fastenc.restore(seeded_model())
    exact = gradients(at(reference, torch.float64))
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    found = {name: 2 * gradient for name, gradient in found.items()}  # DDP takes the mean
    check_gradients([found], [gradients(reference)], [exact])


def test_inference_mode_and_autocast(reference):
    model = fastenc.accelerate(copy.deepcopy(reference))
    with torch.no_grad():
        expected = model(**inputs_of()).last_hidden_state
    with torch.inference_mode():
        out = model(**inputs_of()).last_hidden_state
    assert out.is_inference() and torch.equal(out, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), fastenc.record() as ran:
        low = model(**inputs_of()).last_hidden_state
        plain = reference(**inputs_of()).last_hidden_state
    assert ran.fallbacks == [] and low.dtype == plain.dtype
    real = inputs_of()["attention_mask"] == 1
    error, allowed = ((x - expected)[real].abs().max() for x in (low, plain))
    assert error <= 2 * allowed


# ---- compile and export --------------------------------------------------------------------------


def test_nothing_is_compiled_unasked(reference):
    from torch._dynamo.utils import counters

    def frames(model: nn.Module) -> int:
        torch._dynamo.reset()
        counters.clear()
        model(**inputs_of()).last_hidden_state.sum().backward()
        return sum(counters["frames"].values())

    assert frames(torch.compile(copy.deepcopy(reference), backend="eager")) > 0
    assert frames(fastenc.accelerate(reference)) == 0


def test_compiled_over_many_lengths():
    """The padded entry: the graphs of the first lengths serve all later ones, with gradients."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = seeded_model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for columns in (9, 14, 11, 30):
        ids, mask = padded((columns, 5, columns - 3), columns, 99)
        out = compiled(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(out, model(ids, attention_mask=mask).last_hidden_state)
        out.square().sum().backward()
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1]


def test_compiled_whole_without_padding(reference):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = fastenc.accelerate(reference)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for columns in (9, 14, 30):
        ids, _ = padded((columns, columns), columns, 99)
        out = compiled(ids).last_hidden_state
        torch.testing.assert_close(out, model(ids).last_hidden_state)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("masked", [False, True])
def test_export(reference, masked):
    """torch.export of the base model with dynamic rows and columns, any padding."""
    model = fastenc.accelerate(reference)
    shape = {0: torch.export.Dim("rows"), 1: torch.export.Dim("columns", max=30)}

    def arguments(lengths, columns, side):
        ids, mask = padded(lengths, columns, 99, side)
        return (ids, mask) if masked else (ids,)

    first = arguments((23, 7, 1), 23, "right")
    with torch.no_grad():
        exported = torch.export.export(
            model, first, dynamic_shapes=(shape,) * len(first), strict=False
        )
        for case in (((9, 4), 12, "left"), ((20, 3, 8, 1), 20, "mixed")):
            given = arguments(*case)
            actual = exported.module()(*given).last_hidden_state
            torch.testing.assert_close(actual, model(*given).last_hidden_state)
    if masked:
        ids, mask = padded((9, 4), 12, 99)
        mask[0, 3] = 0
        with pytest.raises(RuntimeError, match="holes"):
            exported.module()(ids, mask)


@pytest.fixture
def exported_to_onnx(monkeypatch):
    """``export(model, arguments)`` as torch.onnx.export does before it converts: the op names."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)

    def export(model, arguments):
        rows = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        shapes = (rows,) * len(arguments)
        program = torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)
        return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}

    return export


def test_onnx_is_given_no_op_of_fastenc(reference, exported_to_onnx):
    """torch.onnx.export's default, dynamo=True, converts none of them."""
    fast = fastenc.accelerate(copy.deepcopy(reference))
    ops = exported_to_onnx(fast, padded((10, 7), 10, 99))
    assert ops and not [op for op in ops if op.startswith("fastenc")]


def test_onnx_needs_another_attn_implementation(reference, exported_to_onnx):
    model = copy.deepcopy(reference)
    model.set_attn_implementation("fastenc")
    with pytest.raises(NotImplementedError, match=r"does not serve torch\.onnx\.export"):
        exported_to_onnx(model, padded((10, 7), 10, 99))


def test_a_trace_holds_for_other_lengths():
    plain = transformers.BertModel(transformers.BertConfig(**test_bert.TINY)).eval()
    plain.requires_grad_(False)
    fast = fastenc.accelerate(copy.deepcopy(plain))
    ids, mask = padded((10, 7), 10, 99)
    with fastenc.record() as ran:
        traced = torch.jit.trace(fast, (ids, mask), strict=False, check_trace=False)
    assert ran.fallbacks == ["BertModel: torch.jit.trace"]
    ids, mask = padded((4, 12, 9), 12, 99)
    found = traced(ids, mask)["last_hidden_state"]
    torch.testing.assert_close(found, plain(ids, mask).last_hidden_state)
