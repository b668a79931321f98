"""SetFitTrainer: setfit's training in exact mode, blocks, losses and heads."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from model_tests import check_trained, telling
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from test_encoder_folder import MINILM, tiny_body

import fastenc
from bench import setfit_peer as peer
from fastenc.testing import assert_parity
from fastenc.train import _setfit_body, _touched_rows

GOOD = ["a charming journey", "wonderful and warm", "I loved every minute", "superb acting",
        "touching, from start to end", "what a delight"]  # fmt: skip
BAD = ["very, very slow", "a tedious mess", "I want my money back", "dull and far too long",
       "the worst film of the year", "boring"]  # fmt: skip
TEXTS, LABELS = GOOD + BAD, [1] * 6 + [0] * 6
DATA = {"text": TEXTS, "label": LABELS}
QUIET = {"show_progress_bar": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny random body, whose weights tell texts apart."""
    path = tmp_path_factory.mktemp("body")
    body = tiny_body(path / "bert")
    telling(body.auto_model)
    modules = [body, st_modules.Pooling(32)]
    SentenceTransformer(modules=modules, device="cpu").save(str(path / "saved"))
    return str(path / "saved")


def model_of(folder, dropout=False, **given) -> fastenc.SetFitModel:
    model = fastenc.SetFitModel.from_pretrained(folder, **given)
    if not dropout:
        peer.without_dropout(model.body)
    return model


def losses(trainer) -> list[float]:
    return [row["embedding_loss"] for row in trainer.state.log_history if "embedding_loss" in row]


def train(model, data=DATA, **given):
    args = fastenc.SetFitTrainingArguments(**{**QUIET, "logging_steps": 1, **given})
    trainer = fastenc.SetFitTrainer(model, args, data)
    trainer.train()
    return trainer


# ---- exact pairing is setfit ---------------------------------------------------------------------


@pytest.mark.parametrize("body, given", [
    ("tiny", {"num_epochs": (2, 1), "seed": 7}),
    ("tiny", {"num_iterations": 2, "batch_size": (5, 2), "l2_weight": 0.3}),
    ("tiny", {"max_steps": 3, "body_learning_rate": (1e-3, 1e-5)}),
    ("MiniLM", {"max_steps": 5}),
    ("prompted", {"max_steps": 3, "body_learning_rate": (1e-3, 1e-5)}),
])  # fmt: skip
def test_exact_pairing_trains_as_setfit(folder, tmp_path, body, given):
    """ "prompted": the body's default prompt is read in stage 2 and in prediction, not in pairs."""
    peer.quiet()
    source = MINILM if body == "MiniLM" else folder
    if body == "prompted":
        model = SentenceTransformer(folder, device="cpu", prompts={"query": "find the best: "},
                                    default_prompt_name="query")  # fmt: skip
        model.save(str(tmp_path))
        source = str(tmp_path)
        assert model_of(source).body.default_prompt == "query"
    before = peer.weights(model_of(source).body)
    head = {"head_params": {"tol": 1e-9, "max_iter": 1000}}  # else it stops a step apart
    expected = peer.load(source, **head)
    peer.without_dropout(expected.model_body)
    expected_losses = peer.trained(expected, TEXTS, LABELS, logging_steps=1, **given)[1]
    reference = peer.load(source, **head)
    peer.without_dropout(reference.model_body.double())
    reference_losses = peer.trained(reference, TEXTS, LABELS, logging_steps=1, **given)[1]
    found = model_of(source, **head)
    trainer = train(found, pairing="exact", **given)

    assert len(losses(trainer)) == len(expected_losses)
    error = np.abs(np.subtract(losses(trainer), reference_losses)).max()
    floor = np.abs(np.subtract(expected_losses, reference_losses)).max()
    assert error <= 2 * floor + 1e-6
    ours, theirs = peer.weights(found.body), peer.weights(expected.model_body)
    truth = peer.weights(reference.model_body)
    check_trained(ours, theirs, truth, before)
    p, q, r = (np.asarray(m.predict_proba(TEXTS)) for m in (found, expected, reference))
    assert np.abs(p - r).max() <= 2 * np.abs(q - r).max() + 1e-5


def test_touched_rows_are_all_rows(folder):
    rows = {}
    for run in ("touched", "all", "frozen", "exact"):
        model = model_of(folder)
        mode = run
        if run == "exact":
            mode = "all"
            model.body.double()
        train(model, embedding_rows=mode, body_learning_rate=1e-2, l2_weight=0.5, max_steps=4)
        rows[run] = peer.weights(model.body)
        assert type(model.body.model.get_input_embeddings()) is torch.nn.Embedding
    name = "embeddings.word_embeddings.weight"
    before = peer.weights(model_of(folder).body)
    check_trained(rows["touched"], rows["all"], rows["exact"], before)
    assert not torch.equal(rows["touched"][name], before[name])
    assert torch.equal(rows["frozen"][name], before[name])
    untouched = (rows["all"][name] / before[name]).median()
    assert 0.9 < untouched < 1, "weight decay reaches rows that no text uses"


def test_touched_rows_hold_little_state():
    model = fastenc.SetFitModel.from_pretrained(MINILM)
    ids = model.body.token_ids(TEXTS)
    with _touched_rows.training_embeddings(model.body.model, "touched", ids):
        trained = sum(p.numel() for p in model.body.parameters())
    assert trained < 0.52 * sum(p.numel() for p in model.body.parameters())


# ---- block pairing -------------------------------------------------------------------------------


def test_blocks_learn_with_fewer_encodings(folder, monkeypatch):
    texts = 0
    embed = _setfit_body.embed

    def counting(body, tokens, bf16=False):
        nonlocal texts
        texts += len(tokens)
        return embed(body, tokens, bf16)

    monkeypatch.setattr(_setfit_body, "embed", counting)
    made = {}
    for pairing in ("block", "exact"):
        texts, model = 0, model_of(folder)
        trainer = train(model, pairing=pairing, body_learning_rate=1e-3, num_epochs=10)
        made[pairing] = texts, losses(trainer)
        assert np.mean(losses(trainer)[-3:]) < 0.8 * np.mean(losses(trainer)[:3])
        assert trainer.evaluate(DATA)["accuracy"] == 1.0
    assert made["block"][0] < 0.8 * made["exact"][0]


def test_the_seed_decides(folder):
    runs = [losses(train(model_of(folder, dropout=True), seed=s, max_steps=3)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_max_length_cuts_training_texts(folder):
    long = {"text": [t + " and so on" * 30 for t in TEXTS], "label": LABELS}
    cut = {"text": TEXTS, "label": LABELS}
    lengths = []
    for data, most in ((long, 4), (cut, None)):
        trainer = fastenc.SetFitTrainer(
            model_of(folder), fastenc.SetFitTrainingArguments(max_length=most, **QUIET), data
        )
        tokens, _ = trainer._tokens(data["text"], trainer.args)
        lengths.append(max(map(len, tokens)))
    assert lengths[0] == 4 < lengths[1]


@pytest.mark.parametrize("loss", ["SupConLoss", "BatchHardTripletLoss", "BatchAllTripletLoss",
                                  "ContrastiveLoss", "OnlineContrastiveLoss"])  # fmt: skip
@pytest.mark.parametrize("pairing", ["block", "exact"])
def test_other_losses_learn(folder, loss, pairing):
    model = model_of(folder)
    given = {"loss": loss, "pairing": pairing, "batch_size": 8, "num_epochs": (12, 1)}
    trainer = train(model, body_learning_rate=1e-3, **given)
    found = losses(trainer)
    assert np.isfinite(found).all() and np.mean(found[-4:]) < np.mean(found[:4])


def test_bf16(folder):
    """Products in bfloat16 under either name, weights and their steps in float32."""
    runs = {}
    for name in ("", "bf16", "use_amp", "plain"):
        model = model_of(folder)
        given = {} if not name else {"bf16": True} if name == "plain" else {name: True}
        with fastenc.use_backend("reference" if name == "plain" else None):
            found = losses(train(model, max_steps=4, body_learning_rate=1e-3, **given))
        runs[name] = torch.tensor(found), peer.weights(model.body)
        assert all(w.dtype == torch.float32 for w in runs[name][1].values())
    assert torch.equal(runs["bf16"][0], runs["use_amp"][0])
    assert not torch.equal(runs["bf16"][0], runs[""][0])
    assert_parity("losses", *(runs[name][0] for name in ("bf16", "plain", "")))
    before = peer.weights(model_of(folder).body)
    check_trained(*(runs[name][1] for name in ("bf16", "plain", "")), before)


def test_progress_is_shown_where_asked(folder, capfd):
    for shown in (False, True):
        capfd.readouterr()
        train(model_of(folder), max_steps=3, show_progress_bar=shown)
        assert ("3/3" in capfd.readouterr().err) == shown


def test_accumulation(folder):
    """Four batches of 3 pairs a step are one of 12; blocks count in batches."""
    runs, fp32 = [], torch.float32
    for size, times, dtype in ((3, 4, fp32), (12, 1, fp32), (12, 1, torch.float64)):
        model = model_of(folder)
        model.body.to(dtype)
        seen = train(model, pairing="exact", batch_size=(size, 2), max_steps=3,
                     gradient_accumulation_steps=times, body_learning_rate=1e-3)  # fmt: skip
        assert seen.state.global_step == 3
        runs.append(peer.weights(model.body))
    check_trained(*runs, peer.weights(model_of(folder).body))
    seen = train(model_of(folder), block_steps=8, block_size=12, gradient_accumulation_steps=4)
    assert seen.state.global_step == 2


@pytest.mark.parametrize("given", [
    {"pairing": "exact", "sampling_strategy": "unique", "max_steps": 5,
     "gradient_accumulation_steps": 4},
    {"max_steps": 1, "block_size": 4},
])  # fmt: skip
def test_max_steps_are_the_most(folder, given):
    """Whole epochs whose last step has fewer batches; blocks of fewer pairs than a batch."""
    assert train(model_of(folder), **given).state.global_step == given["max_steps"]


def test_accumulation_leaves_evaluation_alone(folder):
    def evaluated(batches):
        args = fastenc.SetFitTrainingArguments(
            pairing="exact", eval_strategy="steps", eval_max_steps=1, batch_size=4,
            gradient_accumulation_steps=batches, **QUIET,
        )  # fmt: skip
        return fastenc.SetFitTrainer(model, args, DATA, DATA)._evaluator(args)()

    model = model_of(folder)
    assert evaluated(4) == evaluated(1)


# ---- the head ------------------------------------------------------------------------------------


def test_a_differentiable_head_encodes_once(folder, monkeypatch):
    model = model_of(folder, use_differentiable_head=True, head_params={"out_features": 2})
    calls = []
    forward = model.body.forward
    monkeypatch.setattr(model.body, "forward", lambda b: calls.append(b.num_seqs) or forward(b))
    before = {k: v.clone() for k, v in model.body.state_dict().items()}
    train(model, num_epochs=(0, 30), head_learning_rate=0.1)
    assert sum(calls) == len(TEXTS)
    assert all(torch.equal(v, before[k]) for k, v in model.body.state_dict().items())
    assert [int(i) for i in model.predict(TEXTS)] == LABELS


def test_end_to_end_moves_the_body(folder):
    model = model_of(folder, use_differentiable_head=True, head_params={"out_features": 2})
    before = {k: v.clone() for k, v in model.body.state_dict().items()}
    train(model, num_epochs=(0, 4), end_to_end=True, body_learning_rate=1e-3)
    assert any(not torch.equal(v, before[k]) for k, v in model.body.state_dict().items())
    assert [int(i) for i in model.predict(TEXTS)] == LABELS


def test_the_seed_decides_stage_2_alone(folder):
    """Dropout of the body included."""
    found = []
    model = model_of(folder, dropout=True, use_differentiable_head=True)
    for drawn, seed in enumerate((1, 1, 2)):
        torch.manual_seed(drawn)
        again = copy.deepcopy(model)
        args = fastenc.SetFitTrainingArguments(seed=seed, end_to_end=True, num_epochs=1, **QUIET)
        fastenc.SetFitTrainer(again, args, DATA).train_classifier()
        found.append(again.predict_proba(TEXTS, as_numpy=True))
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_names_and_several_labels(folder):
    names = {"text": TEXTS, "label": ["good" if i else "bad" for i in LABELS]}
    model = model_of(folder)
    trainer = train(model, names, max_steps=3, body_learning_rate=1e-3)
    assert model.labels == ["bad", "good"] and set(model.predict(TEXTS)) <= {"bad", "good"}
    assert trainer.evaluate(names)["accuracy"] > 0.8
    rows = {
        "text": TEXTS,
        "label": [[i, 1 - i, 1 if t < "m" else 0] for t, i in zip(TEXTS, LABELS, strict=True)],
    }
    model = model_of(folder, multi_target_strategy="multi-output")
    trainer = train(model, rows, max_steps=3, body_learning_rate=1e-3)
    assert np.asarray(model.predict(TEXTS)).shape == (12, 3)
    assert 0 <= trainer.evaluate(rows)["accuracy"] <= 1


def test_distillation_follows_the_teacher(folder):
    teacher = model_of(folder)
    train(teacher, body_learning_rate=1e-3, num_epochs=10)
    student = model_of(folder)
    args = fastenc.SetFitTrainingArguments(
        body_learning_rate=3e-3, logging_steps=1, block_steps=120, **QUIET
    )
    trainer = fastenc.SetFitDistillationTrainer(teacher, student, args, {"text": TEXTS})
    start = np.corrcoef(cosines(student), cosines(teacher))[0, 1]
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    assert np.corrcoef(cosines(student), cosines(teacher))[0, 1] > max(start, 0.8)
    assert np.array_equal(student.predict(TEXTS), teacher.predict(TEXTS))
    with pytest.raises(ValueError, match="distillation needs"):
        args = fastenc.SetFitTrainingArguments(loss="supcon")
        fastenc.SetFitDistillationTrainer(teacher, student, args, {"text": TEXTS})


def test_a_student_learns_the_teachers_names(folder):
    names = ["good" if i else "bad" for i in LABELS]
    teacher = model_of(folder, labels=["bad", "good"])
    train(teacher, max_steps=2)
    for given in ({}, {"use_differentiable_head": True}):
        student = model_of(folder, **given)
        args = fastenc.SetFitTrainingArguments(max_steps=1, **QUIET)
        held = {"text": TEXTS, "label": names}
        trainer = fastenc.SetFitDistillationTrainer(teacher, student, args, {"text": TEXTS}, held)
        trainer.train()
        assert student.labels == ["bad", "good"] and set(student.predict(TEXTS)) <= set(names)
        right = np.mean(np.asarray(student.predict(TEXTS)) == names)
        assert trainer.evaluate()["accuracy"] == pytest.approx(right)


def cosines(model) -> np.ndarray:
    x = np.asarray(model.encode(TEXTS))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (x @ x.T)[np.triu_indices(len(x), 1)]


def test_a_modernbert_body_trains(tmp_path):
    from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=30522, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, cls_token_id=101,
        sep_token_id=102, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    torch.manual_seed(0)
    ModernBertModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    model = fastenc.SetFitModel.from_pretrained(tmp_path)
    with fastenc.record() as seen:
        trainer = train(model, body_learning_rate=1e-3, num_epochs=10)
    assert not seen.fallbacks and np.mean(losses(trainer)[-3:]) < losses(trainer)[0]
    assert trainer.evaluate(DATA)["accuracy"] == 1.0
