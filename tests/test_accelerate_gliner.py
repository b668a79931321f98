"""accelerate on live models of the gliner package: same numbers, nothing slow left, all undone."""

from __future__ import annotations

import copy
import itertools
import pickle
from unittest import mock

import gliner_tests
import peft
import pytest
import torch
from gliner_decisions import decided
from model_tests import check_gradients
from test_gliner import LABELS, WORDS
from test_gliner_predict import same, texts

import fastenc
from fastenc.testing import assert_parity

KINDS = {
    "span": {},
    "token": {"span_mode": "token_level"},
    "bi-encoder": {"labels": "bert"},
    "modernbert": {"backbone": "modernbert"},
    "mean of subtokens": {"subtoken_pooling": "mean"},
    "last subtoken": {"subtoken_pooling": "last", "num_rnn_layers": 2},
    "projected": {"hidden_size": 16},
    "label words": {"embed_ent_token": False, "num_rnn_layers": 0},
    "marker": {"span_mode": "marker"},
}
ROWS = [LABELS[:3], LABELS, ["one"], LABELS[1:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [LABELS, ROWS], ids=["shared", "of each text"])
def test_logits(kind, labels):
    plain = gliner_tests.their_model(**KINDS[kind])
    fast = fastenc.accelerate(copy.deepcopy(plain))
    exact = copy.deepcopy(plain)
    exact.model.double()
    batch = gliner_tests.collated(plain, WORDS, labels)
    with torch.no_grad(), fastenc.record() as ran:
        outputs = [m.model(**batch) for m in (fast, plain, exact)]
    assert ran.fallbacks == []
    for name in ("logits", "prompts_embedding", "words_embedding"):
        triple = [getattr(out, name) for out in outputs]
        if name == "logits" and kind == "token":
            triple = [x[outputs[1].mask] for x in triple]
        if name == "prompts_embedding":
            triple = [x[outputs[1].prompts_embedding_mask.bool()] for x in triple]
        if name == "logits" and labels is ROWS:
            seen = outputs[1].prompts_embedding_mask.bool()
            triple = [
                torch.cat([x[i].movedim(-1 if kind != "token" else 1, 0)[seen[i]].flatten()
                           for i in range(len(WORDS))])
                for x in ([out.logits for out in outputs] if kind != "token" else
                          [out.logits * out.mask[..., None, None] for out in outputs])
            ]  # fmt: skip
        assert_parity(name, *triple)
    for name in ("mask", "prompts_embedding_mask"):
        assert torch.equal(getattr(outputs[0], name), getattr(outputs[1], name))


def check_loss(fast, plain, exact, given):
    """The loss is gliner's function of the logits, and no farther from the exact one than logits by
    the parity rule allow: by their largest error times the loss's slopes."""
    with torch.no_grad():
        ours, theirs = fast.model(**given), plain.model(**given)
    with mock.patch.object(exact.model, "loss", wraps=exact.model.loss) as read:
        out = exact.model(**given)
    (slope,) = torch.autograd.grad(out.loss, out.logits)
    read, rounding = read.call_args, 8 * torch.finfo(torch.float32).eps * out.loss.item()
    of_ours = exact.model.loss(ours.logits.double(), *read.args[1:], **read.kwargs)
    assert abs(ours.loss - of_ours) <= rounding
    error = (theirs.logits - out.logits)[slope != 0].abs().max()
    allowed = 2 * error * slope.abs().sum() + rounding
    assert abs(ours.loss - out.loss) <= allowed < 1e-4 * out.loss


@pytest.mark.parametrize("kind", ["span", "token", "bi-encoder"])
def test_loss_and_gradients(kind):
    plain = gliner_tests.their_model(dropout=0.0, **KINDS[kind])
    rows = [
        {"tokenized_text": words, "ner": [[0, min(1, len(words) - 1), "person"]]} for words in WORDS
    ]
    collator = plain.data_collator_class(plain.config, data_processor=plain.data_processor)
    batch = collator(rows, entity_types=[LABELS] * len(rows))
    parts = [collator([row], entity_types=[LABELS]) for row in rows]
    settings = [{"alpha": a, "gamma": c} for a in (-1.0, 0.75) for c in (0.0, 2.0)]
    exact = copy.deepcopy(plain)
    exact.model.double()
    fast = fastenc.accelerate(copy.deepcopy(plain))
    for part in (*parts, batch):
        for given in settings:
            check_loss(fast, plain, exact, {**part, **given})
    gradients = []
    for model in (fast, plain, exact):
        model.model(**batch, alpha=0.75, gamma=2.0).loss.backward()
        gradients.append(
            {n: p.grad for n, p in model.model.named_parameters() if p.grad is not None}
        )
    used = {n for n, g in gradients[2].items() if g.abs().max() > 0}
    check_gradients(*([{n: found[n] for n in used}] for found in gradients))


@pytest.mark.parametrize("kind", ["span", "token", "bi-encoder"])
@pytest.mark.parametrize("options", [{}, {"flat_ner": False, "multi_label": True}], ids=str)
def test_entities(kind, options):
    model = gliner_tests.their_model(decisive=True, **KINDS[kind])
    short = (text[:400] for text in texts(seed=3))
    asked = decided(model, short, 60, LABELS, **options)
    options = {"batch_size": 8, **options}
    expected = model.inference(asked, LABELS, **options)
    assert sum(map(len, expected)) > 60
    names = [n for n, _ in model.named_parameters()]
    classes = [type(x) for x in (model, model.model, model.decoder, model.data_processor)]
    assert fastenc.accelerate(fastenc.accelerate(model)) is model
    assert [n for n, _ in model.named_parameters()] == names
    with fastenc.record() as ran:
        same(model.inference(asked, LABELS, **options), expected)
    op = {"span": "span_score", "token": "token_score", "bi-encoder": "span_score"}[kind]
    assert ran.fallbacks == [] and ran.calls[op]["cpu"] >= 1
    same(pickle.loads(pickle.dumps(model)).inference(asked[:9], LABELS, **options), expected[:9])
    fastenc.restore(model)
    assert [type(x) for x in (model, model.model, model.decoder, model.data_processor)] == classes
    with fastenc.record() as ran:
        same(model.inference(asked[:20], LABELS, **options), expected[:20])
    assert ran.calls == {}


@pytest.mark.parametrize("kind", ["span", "token", "bi-encoder"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_entities_in_bf16(kind, autocast, tmp_path):
    """Of what fp32 finds, as much as gliner finds in bf16, at scores as near; fastenc.GLiNER too.

    Rounding turns decisions: no two ways of computing in bf16 find the same.
    """
    theirs = gliner_tests.their_model(decisive=True, **KINDS[kind])
    asked = [text[:200] for text in itertools.islice(texts(seed=3), 8, 32)]
    fast = fastenc.accelerate(copy.deepcopy(theirs))
    models = [theirs, fast, gliner_tests.ours(theirs, tmp_path)]
    exact = by_span(theirs.inference(asked, LABELS))
    found = []
    for model in models:
        if not autocast:
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(by_span(model.inference(asked, LABELS)))
    common = [exact.keys() & spans.keys() for spans in found]
    error = [max(abs(f[k] - exact[k]) for k in c) for f, c in zip(found, common, strict=True)]
    assert len(common[0]) > 0.8 * len(exact)
    assert min(map(len, common)) >= 0.95 * len(common[0]) and max(error) <= 2 * error[0]


def by_span(entities: list[list[dict]]) -> dict[tuple, float]:
    """Scores by text, start, end and label."""
    return {(i, e["start"], e["end"], e["label"]): e["score"]
            for i, row in enumerate(entities) for e in row}  # fmt: skip


def test_dummy_spans_are_gliners():
    model = gliner_tests.their_model()
    rows = [{"tokenized_text": w, "ner": None} for w in WORDS]
    marked = [{"tokenized_text": WORDS[0], "ner": [[0, 1, "person"], [2, 99, "city"]]}]
    types = [LABELS] * len(WORDS)
    before = [model.data_processor.collate_raw_batch(*x) for x in ((rows, types), (marked, types))]
    fastenc.accelerate(model)
    after = [model.data_processor.collate_raw_batch(*x) for x in ((rows, types), (marked, types))]
    for a, b in zip(before, after, strict=True):
        for name in ("span_idx", "span_label", "span_mask", "seq_length"):
            assert torch.equal(a[name], b[name]), name


def test_what_the_packed_forward_does_not_do_is_said_and_runs():
    model = gliner_tests.their_model(span_mode="query")
    expected = model.predict_entities("Marie Curie", LABELS, threshold=0.3)
    fastenc.accelerate(model)
    with fastenc.record() as ran:
        same([model.predict_entities("Marie Curie", LABELS, threshold=0.3)], [expected])
    assert len(ran.fallbacks) == 1 and "query" in ran.fallbacks[0]
    model = fastenc.accelerate(gliner_tests.their_model())
    with fastenc.record() as ran:
        found = model.predict_entities("Marie Curie", LABELS, threshold=0.0, return_vectors=True)
    assert "vector" in found[0] and "return_vectors" in ran.fallbacks[0]


def lora(model):
    """LoRA on the layers whose weights the folds read."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=r".*(out_project|out_mlp)\.[03]", init_lora_weights=False
    )
    peft.inject_adapter_in_model(config, model)
    model.eval()


def head_of(model):
    return model.scorer if hasattr(model, "scorer") else model.span_rep_layer.span_rep_layer


def hook(model):
    head_of(model).register_forward_hook(lambda module, args, out: out + 1.0)


def quantized(model):
    layers = {torch.nn.Linear}
    torch.ao.quantization.quantize_dynamic(head_of(model), layers, torch.qint8, inplace=True)


@pytest.mark.parametrize("kind", ["span", "token"])
@pytest.mark.parametrize("change", [lora, hook, quantized])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_head_that_is_more_than_its_weights(kind, change, tmp_path):
    """gliner's own forward runs it; fastenc.GLiNER, whose head has no other form, refuses."""
    model = gliner_tests.their_model(decisive=True, **KINDS[kind])
    ours = gliner_tests.ours(model, tmp_path)
    change(model.model)
    asked = [text[:100] for text in itertools.islice(texts(seed=3), 8, 12)]
    expected = model.inference(asked, LABELS, threshold=0.2)
    assert sum(map(len, expected)) > 2
    fastenc.accelerate(model)
    with fastenc.record() as ran:
        same(model.inference(asked, LABELS, threshold=0.2), expected)
    assert any("out_" in reason for reason in ran.fallbacks)
    if change is quantized:  # torch's quantization leaves prepacked layers as they are
        return
    change(ours)
    with pytest.raises(NotImplementedError, match="out_"):
        ours.inference(asked, LABELS)


def test_compiled():
    """With a BiLSTM."""
    model = gliner_tests.their_model(decisive=True)
    asked = ["Marie Curie in Paris", "x y z"]
    expected = model.inference(asked, LABELS)
    fastenc.accelerate(model)
    torch.compiler.reset()
    model.model = torch.compile(model.model, dynamic=True, backend="eager")  # as model.compile()
    with mock.patch.object(torch._dynamo.config, "capture_scalar_outputs", True):
        same(model.inference(asked, LABELS), expected)


def test_prepack_and_the_options_of_the_decoder():
    model = gliner_tests.their_model()
    asked, options = ["Marie Curie in Paris", "x y z"], {"threshold": 0.2}
    extra = {"return_class_probs": True, "input_spans": [[{"start": 0, "end": 11}], []]}
    expected = [model.inference(asked, LABELS, **options, **extra),
                model.inference(asked, [["a", "b"], ["c"]], **options)]  # fmt: skip
    fastenc.accelerate(model, prepack=True)
    same(model.inference(asked, LABELS, **options, **extra), expected[0])
    same(model.inference(asked, [["a", "b"], ["c"]], **options), expected[1])


@pytest.mark.parametrize("kind", [{}, {"span_mode": "token_level"}], ids=["span", "token"])
def test_decoder_options_of_each_text(kind):
    """Lists as gliner takes them: a value a text, and no other number of values."""
    plain = gliner_tests.their_model(decisive=True, **kind)
    fast = fastenc.accelerate(copy.deepcopy(plain))
    found = []
    for model in (plain, fast):
        asked = model.prepare_batch(["Marie Curie works in Paris", "Siemens AG in Turin"], LABELS)
        batch = model.collate_batch(asked["input_x"], asked["entity_types"])
        out = model.run_batch(batch)
        each = {"threshold": [0.2, 0.4], "flat_ner": [True, False], "multi_label": [False, True]}
        spans = model.decode_batch(out, batch, **each)
        found.append([[(s.start, s.end, s.entity_type) for s in text] for text in spans])
        for name, values in each.items():
            for wrong in (values[:1], [*values, values[0]]):
                with pytest.raises(ValueError, match=f"{name} must have length 2"):
                    model.decode_batch(out, batch, **each | {name: wrong})
    assert found[0] == found[1] and all(found[0])
