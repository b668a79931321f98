"""The benchmark code runs at toy size, and its arithmetic is right."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench import attention_rate, breakdown, measure, models, op_bench, report, run
from fastenc import testing


def test_the_end_to_end_suite_at_toy_size():
    results = {**measure.stamp(), "ops": []}
    results["modernbert"] = suite = models.run(
        models.TOY_ROWS,
        layers=2,
        vocab_size=200,
        names=("fastenc", "transformers sdpa"),
        progress=lambda text: None,
    )
    assert [row["name"] for row in suite["rows"]] == [row.name for row in models.TOY_ROWS]
    for row in suite["rows"]:
        assert row["failures"] == {} and 0 < row["fraction_of_floor"] < 10
        assert row["errors"]["fastenc"] < 1e-4
        assert row["breakdown"]["attention"] > 0 and row["breakdown"]["linear"] > 0
    json.dumps(results)
    text = report.tables(results)
    assert "fastenc" in text and "floor / measured" in text
    assert suite["peak_memory"]["row"] == "3 ragged"
    assert "loaded model, 3 ragged: fastenc" in text

    suite["rows"] = suite["rows"][:1]  # only this row was measured again
    assert "loaded model, 3 ragged: fastenc" in report.tables(results)


def test_rows_of_an_earlier_run_stay():
    old = {"rows": [{"name": "8x128", "x": 1}, {"name": "1x2048", "x": 1}], "training": 1}
    new = {"rows": [{"name": "1x2048", "x": 2}, {"name": "4x512", "x": 2}], "layers": 22}
    both = run.merged(old, new)
    assert [(r["name"], r["x"]) for r in both["rows"]] == [
        ("8x128", 1),
        ("4x512", 2),
        ("1x2048", 2),
    ]
    assert both["training"] == 1 and both["layers"] == 22


def test_a_slow_peer_is_called_once(monkeypatch):
    calls = []

    def slow(ids, mask):
        calls.append(1)
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    model = models.modernbert_base(2, 200)
    monkeypatch.setattr(models, "ONCE_PAST", 0.0)
    runners = {"fastenc": slow, "transformers sdpa": slow, "OpenVINO": slow}
    with torch.inference_mode():
        runners["fastenc"](*models.padded_batch((4,), 200))
        monkeypatch.setattr(models, "KEPT", ("fastenc",))
        calls.clear()
        row = models.run_row(model, runners, models.Row("x", (4, 4), 3))
    assert row["once"] == ["OpenVINO"] and len(calls) == 3 + 2 * 3 + 1


def test_a_missing_peer_package_is_no_silent_gap(monkeypatch, tmp_path):
    from bench import peers

    def missing(model, folder):
        raise ModuleNotFoundError("No module named 'openvino'")

    monkeypatch.setitem(peers.PEERS, "OpenVINO", missing)
    with pytest.raises(ImportError, match="openvino"):
        models.build_peers(None, tmp_path, ["OpenVINO"])


@pytest.mark.parametrize("lengths", [(1,), (7, 0, 3), (300,)])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (64, 64), (2, 500), (-1, 3)])
def test_useful_pairs_counts_the_window(lengths, window):
    from fastenc.ops._attention_ref import reach

    counted = sum(int(reach(n, *window, torch.device("cpu")).sum()) for n in lengths)
    assert testing.useful_pairs(lengths, window) == counted


def test_work_of_the_ops():
    geglu = next(testing.cases("geglu", "bench"))
    assert op_bench.work(geglu, torch.float32, False) == (4 * 512 * 2304 * 3 // 2, 0)
    attention = next(testing.cases("varlen_attention", "bench"))
    pairs = testing.useful_pairs((512,) * 4, (64, 64))
    assert op_bench.work(attention, torch.float32, False)[1] == 4 * pairs * 12 * 64
    span = next(testing.cases("span_score", "bench"))
    assert op_bench.work(span, torch.float32, False) == (
        4 * (2 * 384 * 2048 + 10 * 2048 + 384 * 12 * 10),
        2 * 384 * 12 * 10 * 2048,
    )
    for op in ("span_pool", "token_score", "disentangled_attention"):
        for case in testing.cases(op, "bench"):
            moved, flops = op_bench.work(case, torch.bfloat16, True)
            assert moved > 0 and (flops > 0 or op == "span_pool")


def test_results_are_written_whole(tmp_path):
    path = tmp_path / "a" / "b.json"
    measure.write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        measure.write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measure.commit() == "unknown"


def test_attention_rate_at_toy_size():
    rows = list(
        attention_rate.rates(("varlen_attention",), attention_rate.TOY, 1, time.process_time)
    )
    assert [row["window"] for row in rows] == ["window 64", "global"]
    for row in rows:
        assert 0 < row["share_of_sgemm"] < 3 and row["backward_over_forward"] > 0
        assert 0 < row["memory_over_forward"] < 1
    assert "share of sgemm" in attention_rate.table(rows)


def test_interleaved_runs_each_as_often_as_it_says():
    counts = {"a": 0, "b": 0}

    def run(name):
        counts[name] += 1

    runs = {name: lambda name=name: run(name) for name in counts}
    samples = measure.interleaved(runs, 3, warm=False)
    assert counts == {"a": 3, "b": 3} and [len(x) for x in samples.values()] == [3, 3]
    measure.interleaved(runs, 1)
    assert counts == {"a": 5, "b": 5}


def test_breakdown_at_toy_size():
    rows = breakdown.run(models.TOY_ROWS[:1], 1, time.perf_counter, layers=2, vocab_size=200)
    assert [*rows[0]["parts"]] == ["fastenc", "fastenc prepacked"]
    for parts in rows[0]["parts"].values():
        assert parts["linear"] > 0 and parts["attention"] > 0 and parts["elementwise"] > 0
    assert "elementwise / linear layers" in breakdown.table(rows)
    assert models.part_of("fastenc::rope_varlen_attention_fwd") == "attention"
    assert models.part_of("aten::copy_") == "other"
