"""``python -m bench.gpu`` at toy size: every line runs, and a peer that fails is only recorded."""

import dataclasses
import json

from bench import gpu, gpu_models, gpu_peers, gpu_record, gpu_steps


def test_whole_benchmark_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_peers, "compiled", lambda fn: fn)  # the compiler is not under test
    rows = tuple(dataclasses.replace(row, compile=False) for row in gpu_models.TOY_ROWS)
    monkeypatch.setattr(gpu_models, "TOY_ROWS", rows)
    monkeypatch.setattr(gpu, "measure_all", lambda path, left: gpu_steps.main(path, left()))
    # Time enough on a loaded machine: at this size nothing is left out.
    path = gpu.main(["--out", str(tmp_path / "run.json"), "--seconds", "5000"])
    result = json.loads(path.read_text())
    assert result["gpu tests"]["status"] == 0, result["gpu tests"]["output"]
    assert result["cpu tests"]["status"] == 0, result["cpu tests"]["output"]
    assert {"machine", "date", "commit", "versions", "backends", "ceilings"} <= result.keys()
    assert result["step_errors"] == {} and result["lost"] == [] and "running" not in result
    assert result["step_seconds"].keys() == {"stamp", *gpu_record.STEPS}
    assert {r["op"] for r in result["ops"]} == {
        "geglu", "rope", "add_layer_norm", "segment_pool", "varlen_attention",
        "rope_varlen_attention", "span_pool", "span_score", "span_candidates",
        "token_score", "disentangled_attention",
    }  # fmt: skip
    for record in result["ops"]:
        ours = record["runs"]["fastenc triton"]
        assert ours["seconds"] > 0 and ours["floor_over_measured"] > 0, record
        assert "NotImplementedError" in record["runs"]["fastenc cuda"]["error"]
        assert all(run.keys() & {"seconds", "error"} for run in record["runs"].values()), record
    refused = [r["runs"]["cuDNN SDPA"] for r in result["ops"] if "cuDNN SDPA" in r["runs"]]
    assert all("error" in run for run in refused)
    for record in result["models"]:
        assert record["runs"]["fastenc"]["difference"] < 1e-4, record
        assert record["runs"]["fastenc"]["fallbacks"] == []
    for name in ("training", "embedding", "gliner"):
        for record in result[name]:
            assert record["runs"]["fastenc"]["seconds"] > 0, record
    losses = [
        [run["loss"] for run in record["runs"].values()]
        for record in result["training"]
        if "training" in record["model"]
    ]
    assert losses and all(abs(a - b) < 0.05 * abs(b) for a, b in losses)
    for run in result["embedding"][0]["runs"].values():
        assert run["difference"] < 1e-5
    for run in result["setfit"][0]["runs"].values():
        assert run["seconds"] > 0, run
