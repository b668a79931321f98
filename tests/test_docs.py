"""The Python code of README.md and docs/ runs as it stands, on small models at its paths."""

from __future__ import annotations

import re
from pathlib import Path

import gliner_tests
import pytest
import setfit
import test_modernbert
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from test_encoder_folder import tiny_body
from transformers import ModernBertModel

import fastenc

ROOT = Path(__file__).parent.parent
TEXTS, LABELS = ["what a delight", "a tedious mess", "superb", "dull"] * 2, [1, 0, 1, 0] * 2


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.M | re.S)


def run(code: str, **given) -> dict:
    exec(compile(code, "documentation", "exec"), given)
    return given


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with the models that the pages name."""
    root = tmp_path_factory.mktemp("models")
    ModernBertModel(test_modernbert.config_of()).save_pretrained(
        root / "answerdotai/ModernBERT-base"
    )
    body = SentenceTransformer(
        modules=[tiny_body(root / "bert"), st_modules.Pooling(32)], device="cpu"
    )
    for name in ("path/to/all-MiniLM-L6-v2", "path/to/body"):
        body.save(str(root / name))
    model = setfit.SetFitModel.from_pretrained(str(root / "path/to/body"), device="cpu")
    model.fit(TEXTS, LABELS, num_epochs=1)
    model.save_pretrained(root / "path/to/model")
    gliner_tests.ours(gliner_tests.their_model(decisive=True), root / "path/to/gliner")
    return root


@pytest.fixture
def there(models, monkeypatch) -> Path:
    monkeypatch.chdir(models)
    return models


def test_readme(there):
    quickstart, record, accelerated, trained, gliner = blocks("README.md")
    found = run(quickstart, texts=TEXTS)
    assert found["vectors"].shape == (len(TEXTS), 32)
    ids = torch.arange(5, 15)[None]
    model = fastenc.accelerate(found["model"]).eval()
    found = run(record, fastenc=fastenc, model=model, batch={"input_ids": ids})
    assert {"rope_varlen_attention", "geglu"} <= set(found["ran"].calls)
    assert found["ran"].fallbacks == []
    names = {"fastenc": fastenc, "setfit": setfit, "SentenceTransformer": SentenceTransformer}
    found = run(accelerated, **names)
    assert type(found["model"]).__module__.startswith("setfit")
    found = run(trained, fastenc=fastenc, texts=TEXTS, labels=LABELS)
    assert (there / "mine" / "head.json").is_file()
    assert (there / "for-setfit" / "model_head.pkl").is_file()
    run(gliner, texts=TEXTS, labels=["person", "city"])
    assert "<html" in (there / "entities.html").read_text("utf-8")


def test_gliner(there):
    training, reading = blocks("docs/gliner.md")
    found = run(training)
    assert found["trainer"].state.global_step == 4
    assert "eval_f1/person" in found["trainer"].evaluate()
    found = run(reading, fastenc=fastenc)
    assert found["cut"] == [816] and found["entities"]
