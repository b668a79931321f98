"""Models with heads, ours and accelerated: transformers' losses, outputs and weights."""

from __future__ import annotations

import copy

import pytest
import test_bert
import test_deberta
import test_modernbert
import test_mpnet
import torch
import transformers
from model_tests import at, check_model, padded, telling

import fastenc
from fastenc.testing import assert_parity

MODERN = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering",
          "MultipleChoice")  # fmt: skip
FAMILIES = {
    "ModernBert": MODERN,
    "Bert": (*MODERN, "PreTraining", "NextSentencePrediction"),
    "Roberta": MODERN,
    "XLMRoberta": MODERN,
    "DebertaV2": MODERN,
    "MPNet": MODERN,
}
NAMES = [f"{family}For{head}" for family, heads in FAMILIES.items() for head in heads]
READS_PADDING = "the loss reads hidden states of the padding"


def model_of(name: str, **options):
    cls = getattr(transformers, name)
    if name.startswith("ModernBert"):
        config = test_modernbert.config_of(**options)
    elif name.startswith(("DebertaV2", "MPNet")):
        tiny = (test_deberta if name.startswith("D") else test_mpnet).TINY
        config = cls.config_class(**tiny | options)
    else:
        kin = {} if name.startswith("Bert") else {"pad_token_id": 1, "max_position_embeddings": 40}
        config = cls.config_class(**test_bert.TINY | kin | options)
    return telling(cls(config)).eval()


def inputs_of(name: str, side: str = "right") -> dict:
    """Padded inputs with labels, none of them in the padding."""
    head = name.partition("For")[2]
    lengths = (17, 7, 1, 12)
    if head == "MultipleChoice":  # one number a row: of four, plain PyTorch's may all be lucky
        lengths *= 4
    ids, mask = padded(lengths, 17, 99, side)
    g = torch.Generator().manual_seed(0)
    chosen = (torch.rand(ids.shape, generator=g) < 0.4) & (mask == 1)
    labels = {
        "MaskedLM": {"labels": torch.where(chosen, ids, -100)},
        "PreTraining": {"labels": torch.where(chosen, ids, -100),
                        "next_sentence_label": torch.tensor([0, 1, 1, 0])},
        "NextSentencePrediction": {"labels": torch.tensor([0, 1, 1, 0])},
        "SequenceClassification": {"labels": torch.tensor([0, 1, 1, 0])},
        "TokenClassification": {"labels": torch.where(chosen, ids % 2, -100)},
        "QuestionAnswering": {"start_positions": torch.tensor([3, 2, 0, 1]),
                              "end_positions": torch.tensor([5, 2, 0, 4])},
        "MultipleChoice": {"labels": torch.arange(8) % 2},
    }[head]  # fmt: skip
    if head == "MultipleChoice":
        ids, mask = ids.view(8, 2, 17), mask.view(8, 2, 17)
    return {"input_ids": ids, "attention_mask": mask} | labels


def real_outputs(model, inputs: dict) -> dict[str, torch.Tensor]:
    """Outputs at real tokens, and those that have no token axis."""
    mask = inputs["attention_mask"]
    outputs = {k: x for k, x in model(**inputs).items() if isinstance(x, torch.Tensor)}
    return {k: x[mask == 1] if x.shape[:2] == mask.shape else x for k, x in outputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    reference = model_of(name)
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    inputs = inputs_of(name)
    with fastenc.record() as ran:
        check_model(accelerated, reference, inputs)
    base = f"{name.partition('For')[0]}Model"
    expected = [f"{base}: {READS_PADDING}"] if name.endswith("QuestionAnswering") else []
    assert ran.fallbacks == expected
    restored = fastenc.restore(accelerated)
    assert type(restored) is type(reference)
    found, before = real_outputs(restored, inputs), real_outputs(reference, inputs)
    assert all(torch.equal(found[key], before[key]) for key in before)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("QuestionAnswering")])
def test_answers_without_padding(name):
    """Nothing falls back where there is no padding to read."""
    reference = model_of(name)
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    inputs = {k: x for k, x in inputs_of(name).items() if k != "attention_mask"}
    with fastenc.record() as ran:
        check_model(accelerated, reference, inputs)
    assert ran.fallbacks == [] and "add_layer_norm" in ran.calls


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("Classification")])
def test_left_padding(name):
    """What pools the first token takes the first real one: as under right padding."""
    accelerated = fastenc.accelerate(model_of(name))
    left, right = inputs_of(name, "left"), inputs_of(name, "right")
    mask = left["attention_mask"]
    for row, length in enumerate(mask.sum(1)):
        right["input_ids"][row, :length] = left["input_ids"][row, 17 - length :]
    if name.startswith("Bert"):  # BERT's positions are columns
        columns = torch.arange(17).expand(4, 17)
        left["position_ids"] = (columns - mask.argmax(1, keepdim=True)).clamp(min=0)
    if name.startswith(("XLM", "Roberta", "MPNet")):
        left["input_ids"] = torch.where(mask == 1, left["input_ids"], 1)
    del left["labels"], right["labels"]
    actual, expected = (real_outputs(accelerated, x)["logits"] for x in (left, right))
    torch.testing.assert_close(actual, expected)
    with fastenc.record() as ran:
        hooked = accelerated.base_model.embeddings.register_forward_hook(lambda *args: None)
        fallen = real_outputs(accelerated, left)["logits"]
        hooked.remove()
    assert len(ran.fallbacks) == 1
    torch.testing.assert_close(fallen, actual)


def test_left_padding_of_choices():
    """DeBERTa's choices have no pooler of the base model's, which knows the first real token."""
    accelerated = fastenc.accelerate(model_of("DebertaV2ForMultipleChoice"))
    left, right = (inputs_of("DebertaV2ForMultipleChoice", side) for side in ("left", "right"))
    real = [x["attention_mask"] == 1 for x in (left, right)]
    right["input_ids"][real[1]] = left["input_ids"][real[0]]
    torch.testing.assert_close(accelerated(**left).logits, accelerated(**right).logits)


@pytest.mark.parametrize("head", MODERN)
def test_our_own_classes(head, tmp_path):
    """Built, saved and loaded both ways; the base model inside is packed."""
    reference = model_of(f"ModernBertFor{head}")
    reference.save_pretrained(tmp_path / "theirs")
    cls = getattr(fastenc, f"ModernBertFor{head}")
    ours = cls.from_pretrained(tmp_path / "theirs")
    assert type(ours.model) is type(cls(reference.config).model) is fastenc.ModernBertModel
    assert fastenc.restore(ours) is ours and type(ours.model) is fastenc.ModernBertModel
    assert ours.state_dict().keys() == reference.state_dict().keys()
    inputs = {k: x for k, x in inputs_of(f"ModernBertFor{head}").items() if "positions" not in k}
    actual, plain = real_outputs(ours, inputs), real_outputs(reference, inputs)
    exact = real_outputs(at(reference, torch.float64), inputs)
    assert actual.keys() == plain.keys()
    for key in exact:
        assert_parity(key, actual[key], plain[key], exact[key])
    ours.save_pretrained(tmp_path / "ours")
    back = type(reference).from_pretrained(tmp_path / "ours").eval()
    for key, x in real_outputs(back, inputs).items():
        assert torch.equal(x, plain[key])
    as_tuple = ours(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(actual)


def test_mean_pooling():
    reference = model_of("ModernBertForSequenceClassification", classifier_pooling="mean")
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    check_model(accelerated, reference, inputs_of("ModernBertForSequenceClassification"))


@pytest.mark.parametrize("labels, problem", [
    (torch.tensor([0.5, 1.0, -2.0, 0.0]), "regression"),
    (torch.rand(4, 3), "multi_label_classification"),
])  # fmt: skip
def test_other_losses_of_sequence_classification(labels, problem):
    count = 1 if labels.dim() == 1 else labels.shape[1]
    reference = model_of("ModernBertForSequenceClassification", num_labels=count)
    reference.config.problem_type = problem
    inputs = inputs_of("ModernBertForSequenceClassification") | {"labels": labels}
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    torch.testing.assert_close(accelerated(**inputs).loss, reference(**inputs).loss)


MASKED_LM = [name for name in NAMES if name.endswith(("MaskedLM", "PreTraining"))]


@pytest.mark.parametrize("name", MASKED_LM)
def test_masked_lm_decodes_real_tokens_only(name):
    model = fastenc.accelerate(model_of(name))
    key = "prediction_logits" if name.endswith("PreTraining") else "logits"
    rows = []
    model.get_output_embeddings().register_forward_hook(
        lambda m, args, out: rows.append(out.numel() // out.shape[-1])
    )
    inputs = inputs_of(name)
    full = model(**inputs)
    model.config.sparse_prediction = True
    sparse = model(**inputs)
    labelled = inputs["labels"] != -100
    assert rows == [37, int(labelled.sum())]
    assert (full[key][inputs["attention_mask"] == 0] == 0).all()
    torch.testing.assert_close(sparse[key], full[key][labelled])
    torch.testing.assert_close(sparse.loss, full.loss)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    without = {k: x for k, x in inputs.items() if "label" not in k}
    torch.testing.assert_close(model(**without)[key], full[key])
    positional = model(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(positional[key], full[key])


def test_the_label_that_sparse_prediction_leaves_out():
    options = {"sparse_prediction": True, "sparse_pred_ignore_index": -1}
    reference = model_of("ModernBertForMaskedLM", **options)
    inputs = inputs_of("ModernBertForMaskedLM")
    inputs["labels"] = torch.where(inputs["labels"] == -100, -1, inputs["labels"])
    del inputs["attention_mask"]
    actual, expected = fastenc.accelerate(copy.deepcopy(reference))(**inputs), reference(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("name", MASKED_LM)
def test_masked_lm_over_a_base_that_falls_back(name):
    """Real tokens are found in transformers' own hidden states; padding holds zeros."""
    reference, inputs = model_of(name), inputs_of(name, "left")
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    if name.endswith("PreTraining"):  # its pooler reads the first real token
        del inputs["next_sentence_label"]
    key = "prediction_logits" if name.endswith("PreTraining") else "logits"
    accelerated.base_model.embeddings.register_forward_hook(lambda *args: None)
    with fastenc.record() as ran:
        actual = accelerated(**inputs)
    expected, real = reference(**inputs), inputs["attention_mask"] == 1
    assert len(ran.fallbacks) == 1
    torch.testing.assert_close(actual[key][real], expected[key][real])
    assert (actual[key][~real] == 0).all()
    if expected.loss is not None:
        torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "DebertaV2ForSequenceClassification"])
def test_a_head_over_a_base_that_stays_transformers(name):
    reference = model_of(name)
    accelerated = copy.deepcopy(reference)
    accelerated.base_model.forward = accelerated.base_model.forward
    fastenc.accelerate(accelerated)
    assert type(accelerated.base_model).__module__.startswith("transformers.")
    inputs = inputs_of(name)
    actual, expected = (real_outputs(model, inputs) for model in (accelerated, reference))
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "ModernBertForMaskedLM",
        "BertForMaskedLM",
        "DebertaV2ForMaskedLM",
        "MPNetForMaskedLM",
        "BertForTokenClassification",
        "DebertaV2ForTokenClassification",
        "MPNetForTokenClassification",
    ],
)
def test_labels_in_the_padding_count_as_in_transformers(name, sparse):
    reference = model_of(name)
    reference.sparse_prediction = sparse
    inputs = inputs_of(name)
    inputs["labels"] = inputs["labels"].clamp(min=0)
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    with fastenc.record() as ran:
        actual = accelerated(**inputs).loss
    assert [reason.partition(": ")[2] for reason in ran.fallbacks] == [READS_PADDING]
    torch.testing.assert_close(actual, reference(**inputs).loss)


@pytest.mark.parametrize("name", ["DebertaV2ForSequenceClassification", "MPNetForMaskedLM"])
def test_compiled(name):
    model = fastenc.accelerate(model_of(name))
    inputs = inputs_of(name)
    expected = model(**inputs)
    torch.compiler.reset()
    found = torch.compile(model, backend="eager")(**inputs)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("padded_too", [False, True])
def test_debertas_decoder_that_reads_the_embeddings(padded_too):
    reference = model_of("DebertaV2ForMaskedLM", legacy=False)
    inputs = inputs_of("DebertaV2ForMaskedLM")
    if padded_too:
        inputs["labels"] = inputs["labels"].clamp(min=0)
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    with fastenc.record() as ran:
        check_model(accelerated, reference, inputs)
    assert len(ran.fallbacks) == padded_too


def test_tied_weights(tmp_path):
    ours = fastenc.ModernBertForMaskedLM(test_modernbert.config_of())
    assert ours.decoder.weight is ours.model.embeddings.tok_embeddings.weight
    ours.save_pretrained(tmp_path)
    back = fastenc.ModernBertForMaskedLM.from_pretrained(tmp_path)
    assert back.decoder.weight is back.model.embeddings.tok_embeddings.weight
    loose = fastenc.ModernBertForMaskedLM(test_modernbert.config_of(tie_word_embeddings=False))
    assert loose.decoder.weight is not loose.model.embeddings.tok_embeddings.weight


# configurations of the same model_type, as published, with fewer layers and words
KIN = {
    "ettin": {"num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 96,
              "local_attention": 128, "norm_eps": 1e-5, "classifier_pooling": "mean"},
    "mmbert": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 16e4}
        for kind in ("full_attention", "sliding_attention")}, "classifier_activation": "gelu"},
    "gte-modernbert": {"classifier_pooling": "mean", "classifier_dropout": 0.0},
    "granite": {"hidden_size": 64, "num_attention_heads": 2, "hidden_activation": "silu",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 8e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
}  # fmt: skip


@pytest.mark.parametrize("kin", KIN)
def test_kin_of_modernbert(kin):
    reference = model_of("ModernBertForSequenceClassification", **KIN[kin])
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    with fastenc.record() as ran:
        check_model(accelerated, reference, inputs_of("ModernBertForSequenceClassification"))
    assert ran.fallbacks == [] and {"geglu", "rope_varlen_attention"} <= ran.calls.keys()
