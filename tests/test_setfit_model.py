"""SetFitModel: setfit's predictions from its files, fastenc's head files, and back."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import setfit
import torch
from embedding_tests import Expected, as_tensor
from model_tests import telling
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from sklearn.linear_model import LogisticRegression
from test_encoder_folder import MINILM, expected_of, tiny_body

import fastenc
from fastenc.models._setfit_checks import check_examples
from fastenc.models._setfit_heads import DifferentiableHead, LinearHead
from fastenc.models.setfit import SetFitModel

GOOD = ["a charming journey", "wonderful and warm", "I loved every minute", "superb acting"]
BAD = ["very, very slow", "a tedious mess", "I want my money back", "dull and far too long"]
ODD = ["it rained today", "the film has 3 acts", "shot in Rome", "a sequel was announced"]
TEXTS = GOOD + BAD + ODD
MORE = ["what a delight", "", "boring", "the crew flew to Rome in May. " * 9, "fine, I guess"]
CLASSES = {
    2: [1] * 4 + [0] * 4 + [0] * 4,
    3: [2] * 4 + [0] * 4 + [1] * 4,
    "names": ["good"] * 4 + ["bad"] * 4 + ["odd"] * 4,
}
ROWS = [[1, 0, 1]] * 2 + [[1, 0, 0]] * 2 + [[0, 1, 1]] * 2 + [[0, 1, 0]] * 2 + [[0, 0, 0]] * 4
STRATEGIES = ["one-vs-rest", "multi-output", "classifier-chain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny random body, whose weights tell texts apart."""
    path = tmp_path_factory.mktemp("body")
    body = tiny_body(path / "bert")
    telling(body.auto_model)
    modules = [body, st_modules.Pooling(32)]
    SentenceTransformer(modules=modules, device="cpu").save(str(path / "saved"))
    return str(path / "saved")


def trained(folder, examples, **options) -> setfit.SetFitModel:
    """setfit's model, its head fitted on the frozen body."""
    theirs = setfit.SetFitModel.from_pretrained(folder, **options)
    theirs.fit(TEXTS, examples, num_epochs=2, batch_size=4, head_learning_rate=0.05, l2_weight=0.01,
               max_length=64, show_progress_bar=False)  # fmt: skip
    return theirs


def as_numpy(x) -> np.ndarray:
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def assert_same_model(ours, theirs) -> None:
    exact = copy.deepcopy(theirs)
    for part in (exact.model_body, exact.model_head):
        if isinstance(part, torch.nn.Module):
            part.double()
    probabilities = Expected(*(as_tensor(m.predict_proba(MORE)) for m in (theirs, exact)))
    for texts, rows in ((MORE, slice(None)), (MORE[:3], slice(3)), (MORE[0], 0)):
        p, q = ours.predict_proba(texts), theirs.predict_proba(texts)
        assert type(p) is type(q) and p.shape == q.shape
        probabilities.check(p, rows)
        for options in ({}, {"use_labels": False}, {"as_numpy": True}):
            found, expected = ours.predict(texts, **options), theirs.predict(texts, **options)
            assert type(found) is type(expected)
            assert np.array_equal(as_numpy(found), as_numpy(expected))
            assert getattr(found, "dtype", None) == getattr(expected, "dtype", None)


CASES = {
    "two classes": (CLASSES[2], {}),
    "three classes": (CLASSES[3], {"labels": ["bad", "odd", "good"]}),
    "names": (CLASSES["names"], {}),
    "normalised, weighted": (
        CLASSES[3],
        {"normalize_embeddings": True, "head_params": {"C": 4.0, "class_weight": "balanced"}},
    ),
    **{s: (ROWS, {"multi_target_strategy": s}) for s in STRATEGIES},
    "one class against the rest": (CLASSES[3], {"multi_target_strategy": "one-vs-rest"}),
    "differentiable": (
        CLASSES[3],
        {"use_differentiable_head": True, "head_params": {"out_features": 3, "temperature": 0.5}},
    ),
    "differentiable, rows": (
        [[float(x) for x in row] for row in ROWS],
        {
            "use_differentiable_head": True,
            "multi_target_strategy": "multi-output",
            "head_params": {"out_features": 3},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_setfit_there_and_back(folder, tmp_path, case):
    """setfit's folder -> fastenc -> safetensors -> fastenc -> setfit's folder -> setfit."""
    labels, options = CASES[case]
    theirs = trained(folder, labels, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="trust_pickle=True"):
        SetFitModel.from_pretrained(tmp_path / "theirs")
    ours = SetFitModel.from_pretrained(tmp_path / "theirs", trust_pickle=True)
    assert_same_model(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert not list((tmp_path / "ours").rglob("*.pkl"))
    again = SetFitModel.from_pretrained(tmp_path / "ours")
    assert_same_model(again, theirs)
    assert again.labels == theirs.labels
    assert again.multi_target_strategy == options.get("multi_target_strategy")
    assert again.normalize_embeddings == theirs.normalize_embeddings
    again.export_setfit(tmp_path / "export")
    assert_same_model(setfit.SetFitModel.from_pretrained(str(tmp_path / "export")), theirs)
    assert_same_model(SetFitModel.from_pretrained(tmp_path / "export"), theirs)  # without trust


def fit_heads(ours: SetFitModel, theirs, labels) -> None:
    """Both on setfit's embeddings (the optimum moves more than they do), the peer's in fp64 as
    ours: in fp32 its solver ends anywhere."""
    x = theirs.encode(TEXTS)
    ours.fit_head(x, labels)
    theirs.model_head.fit(x.astype(np.float64), labels)
    for part in getattr(theirs.model_head, "estimators_", [theirs.model_head]):
        if hasattr(part, "coef_"):
            part.coef_ = part.coef_.astype(x.dtype)
            part.intercept_ = part.intercept_.astype(x.dtype)


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_fit_head_is_scikit_learn(folder, strategy):
    ours = SetFitModel.from_pretrained(
        folder, multi_target_strategy=strategy, head_params={"C": 2.0}
    )
    labels = CLASSES["names"] if strategy is None else ROWS
    theirs = trained(folder, labels, multi_target_strategy=strategy, head_params={"C": 2.0})
    with fastenc.record() as ran:
        expected_of(theirs.model_body, TEXTS).check(ours.encode(TEXTS))
        fit_heads(ours, theirs, labels)
    assert ran.fallbacks == []
    assert_same_model(ours, theirs)


def test_constant_output(folder):
    """scikit-learn's one-vs-rest has a constant predictor for it."""
    rows = [[*row, 1, 0] for row in ROWS]
    ours = SetFitModel.from_pretrained(folder, multi_target_strategy="one-vs-rest")
    theirs = trained(folder, rows, multi_target_strategy="one-vs-rest")
    fit_heads(ours, theirs, rows)
    assert_same_model(ours, theirs)


def test_prediction_needs_no_scikit_learn(folder, tmp_path):
    ours = SetFitModel.from_pretrained(folder, labels=["bad", "odd", "good"])
    ours.fit_head(ours.encode(TEXTS), CLASSES[3])
    ours.save_pretrained(tmp_path)
    expected = ours.predict(MORE[:4])
    code = (
        "import sys\n"
        "for name in ('sklearn', 'joblib', 'setfit', 'sentence_transformers'):\n"
        "    sys.modules[name] = None\n"
        "import fastenc\n"
        f"model = fastenc.SetFitModel.from_pretrained({str(tmp_path)!r})\n"
        f"print(model.predict({MORE[:4]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == str(expected)


def test_differentiable_head_learns():
    torch.manual_seed(0)
    ours = SetFitModel.from_pretrained(
        MINILM, use_differentiable_head=True, labels=["bad", "odd", "good"]
    )
    assert ours.head.out_features == 3
    x, y = ours.encode(TEXTS), torch.tensor(CLASSES[3])
    optimizer = torch.optim.AdamW(ours.head.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        ours.head.get_loss_fn()(ours.head(x)[0], y).backward()
        optimizer.step()
    assert ours.predict(TEXTS) == [ours.labels[i] for i in CLASSES[3]]
    ours.freeze("body")
    assert not any(p.requires_grad for p in ours.body.parameters())
    assert all(p.requires_grad for p in ours.head.parameters())
    ours.unfreeze()
    assert all(p.requires_grad for p in ours.body.parameters())


def test_a_head_is_fitted_again_with_its_parameters(folder, tmp_path):
    """Class weights by number, NumPy's numbers and labels survive a reload."""
    given = {"class_weight": {0: np.float64(1.0), np.int64(1): 50.0}, "C": np.float64(0.5)}
    model = SetFitModel.from_pretrained(folder, head_params=given, labels=np.array([3, 4]))
    x, y = model.encode(TEXTS), np.arange(len(TEXTS)) % 3 == 0
    model.fit_head(x, y.astype(int))
    model.save_pretrained(tmp_path)
    again = SetFitModel.from_pretrained(tmp_path)
    assert again.labels == [3, 4]
    assert again.head.params == {"class_weight": {0: 1.0, 1: 50.0}, "C": 0.5}
    again.fit_head(x, y.astype(int))
    assert np.array_equal(again.predict_proba(TEXTS), model.predict_proba(TEXTS))


def test_parameters_of_a_differentiable_head(folder):
    """setfit's own, of which the body decides some."""
    given = {"in_features": 7, "device": "cpu", "out_features": 3, "temperature": 2.0}
    model = SetFitModel.from_pretrained(folder, use_differentiable_head=True, head_params=given)
    head = model.head
    assert (head.in_features, head.out_features, head.temperature) == (32, 3, 2.0)
    with pytest.raises(ValueError, match="has no some-other"):
        SetFitModel.from_pretrained(
            folder, use_differentiable_head=True, multi_target_strategy="some-other"
        )


def test_newer_pickle_wins(folder, tmp_path):
    """setfit saved over fastenc's export: fastenc's head files are of an older head."""
    ours = SetFitModel.from_pretrained(folder)
    ours.fit_head(ours.encode(TEXTS), CLASSES[3])
    ours.export_setfit(tmp_path)
    theirs = trained(folder, CLASSES[2])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_pickle"):
        SetFitModel.from_pretrained(tmp_path)
    assert_same_model(SetFitModel.from_pretrained(tmp_path, trust_pickle=True), theirs)
    with pytest.raises(ValueError, match="another model"):
        ours.save_pretrained(tmp_path)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error, message, labels, strategy", [
    (ValueError, "at least 2 classes, got only 1 in 12", [1] * 12, None),
    (ValueError, "None at index 3", [0, 1, 0, None] * 3, None),
    (TypeError, "one type, got int and str", [0, "a"] * 6, None),
    (TypeError, "strings or integers, got float", [0.5, 1.0] * 6, None),
    (ValueError, "got 12 texts, 11 labels", [0, 1] * 5 + [1], None),
    (ValueError, "need a multi_target_strategy", ROWS, None),
    (ValueError, "rows of one length", [[0, 1]] * 11 + [[1]], "one-vs-rest"),
    (ValueError, "0 and 1 in every row, got 2", [[0, 1], [1, 2]] * 6, "one-vs-rest"),
    (TypeError, "rows of labels and single", [[0, 1], 1] * 6, "one-vs-rest"),
    (ValueError, "one value only for output 1", [[0, 1], [1, 1]] * 6, "multi-output"),
    (ValueError, "expects a list of 0 and 1", [0, 1] * 6, "classifier-chain"),
])  # fmt: skip
def test_bad_labels(error, message, labels, strategy):
    with pytest.raises(error, match=message):
        check_examples(TEXTS, labels, strategy)


def test_bad_examples(caplog):
    with pytest.raises(TypeError, match="NoneType at index 1"):
        check_examples(["a", None], [0, 1])
    with pytest.raises(ValueError, match="empty text at 1"):
        check_examples(["a", "  "], [0, 1])
    with pytest.raises(ValueError, match="got 2 examples, 3 labels"):
        check_examples(["a", "b"], [0, 1], names=["x", "y", "z"])
    with pytest.raises(ValueError, match="got none"):
        check_examples([], [])
    with caplog.at_level(logging.WARNING, "fastenc"):
        texts, labels = check_examples(["a", "b", "a"], [0, 1, 1])
    assert texts == ["a", "b", "a"] and labels.tolist() == [0, 1, 1]
    assert "1 text(s) occur with different labels, the first: 'a' with [0, 1]" in caplog.text


@pytest.fixture(scope="module")
def fitted(folder) -> SetFitModel:
    ours = SetFitModel.from_pretrained(folder)
    ours.fit_head(ours.encode(TEXTS), CLASSES[3])
    return ours


def test_bad_prediction(fitted):
    for bad, where in (([None], "NoneType at index 0"), (["a", 3], "int at index 1"), (5, "int")):
        with pytest.raises(TypeError, match=where):
            fitted.predict(bad)
    with pytest.raises(ValueError, match="not fitted"):
        SetFitModel(fitted.body, LinearHead()).predict("a")
    assert len(fitted.predict([])) == 0 and fitted.predict_proba([]).shape == (0, 3)


def test_bad_heads(fitted, folder, tmp_path):
    with pytest.raises(ValueError, match="embeddings of 7 numbers, the body gives 32"):
        SetFitModel(fitted.body, DifferentiableHead(7))
    with pytest.raises(ValueError, match=r"expected 3 names .* got 2"):
        SetFitModel(fitted.body, fitted.head, labels=["a", "b"])
    with pytest.raises(ValueError, match="expected None or one of one-vs-rest"):
        LinearHead("chain")
    with pytest.raises(ValueError, match="no classifier-chain"):
        SetFitModel.from_pretrained(
            folder, use_differentiable_head=True, multi_target_strategy="classifier-chain"
        )
    with pytest.raises(ValueError, match="finite"):
        fitted.fit_head(np.full((2, 32), np.nan, np.float32), [0, 1])
    with pytest.raises(TypeError, match="SetFitTrainer"):
        SetFitModel(fitted.body, DifferentiableHead(32)).fit_head(np.zeros((2, 32)), [0, 1])
    fitted.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "head.json").read_text())
    about["settings"]["part_classes"] = [[0, 1]]
    (tmp_path / "head.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"does not fit head.json"):
        SetFitModel.from_pretrained(tmp_path)


def test_other_estimators_are_refused():
    from sklearn.neighbors import KNeighborsClassifier

    with pytest.raises(TypeError, match="got KNeighborsClassifier"):
        LinearHead().adopt(KNeighborsClassifier())
    head = LinearHead()
    head.adopt(LogisticRegression().fit(np.eye(3, dtype=np.float32), [0, 1, 1]))
    assert head.fitted and head.in_features == 3
