"""What a forward on a GPU may not do: read device memory from the host.

The meta device stands in for the GPU. Its tensors have no contents, so whatever would wait for a
GPU (``item``, ``tolist``, ``nonzero``, a copy to the CPU) raises there.
"""

from __future__ import annotations

import pytest
import torch

import fastenc
from fastenc.nn import VarlenBatch
from tests.model_tests import padded
from tests.test_cuda_graphs import MODELS, build

each_model = pytest.mark.parametrize("name", MODELS)
LENGTHS = (5, 9, 0, 3)


@pytest.fixture
def synchronisations(monkeypatch):
    """Counts reads of device memory, and answers them with the numbers of LENGTHS."""
    reads = []

    def tolist(self):
        if self.device.type != "meta":
            return plain(self)
        reads.append(self.shape)
        return [sum(LENGTHS), max(LENGTHS), 0]

    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return reads


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.cpu, bool, int]
)
def test_the_stand_in_objects_to_every_read(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device="meta"))


@each_model
def test_none_from_a_packed_batch(name, synchronisations):
    model = build(name).to("meta")
    ids = [list(range(n)) for n in LENGTHS]
    with torch.inference_mode():
        batch = VarlenBatch.from_lists(ids, device="meta")
        hidden = model.forward_packed(batch)
        pooled = fastenc.segment_pool(hidden, batch.cu_seqlens)
    assert pooled.shape == (4, 32) and pooled.device.type == "meta"
    assert not synchronisations


@each_model
def test_none_from_a_mask_on_the_cpu(name, synchronisations):
    model = build(name).to("meta")
    ids, mask = padded(LENGTHS, 9, 97, "left")
    with torch.inference_mode():
        out = model(input_ids=ids.to("meta"), attention_mask=mask)
    assert out.last_hidden_state.shape == (4, 9, 32) and not synchronisations


@each_model
def test_one_from_a_mask_on_the_device(name, synchronisations):
    model = build(name).to("meta")
    ids, mask = padded(LENGTHS, 9, 97)
    with torch.inference_mode():
        out = model(input_ids=ids.to("meta"), attention_mask=mask.to("meta"))
    assert out.last_hidden_state.shape == (4, 9, 32) and len(synchronisations) == 1


@each_model
def test_none_without_a_mask(name, synchronisations):
    model = build(name).to("meta")
    with torch.inference_mode():
        model(input_ids=torch.zeros(3, 9, dtype=torch.int64, device="meta"))
    assert not synchronisations


@pytest.mark.gpu
@each_model
def test_a_gpu_agrees(name):
    model = build(name).to("cuda", torch.bfloat16)
    ids, mask = padded(LENGTHS, 9, 97)
    ids = ids.to("cuda")
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask)  # tables and kernels are made once
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(input_ids=ids, attention_mask=mask.pin_memory())
        finally:
            torch.cuda.set_sync_debug_mode("default")
