"""Training over two gloo processes: the gradients of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from model_tests import check_gradients
from test_setfit_trainer import BAD, GOOD, folder  # noqa: F401

ROOT = Path(__file__).parent.parent
SHARE = """
import sys, torch, fastenc
from bench.setfit_peer import without_dropout
rank, world, folder, store, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
if world > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                                         world_size=world)
GOOD, BAD = __import__("json").loads(sys.argv[6])
exact = sys.argv[7] == "exact"
from fastenc.train import _processes
kept = {}
add_up = _processes.sum_gradients
def keeping(parameters):
    add_up(parameters)
    if not kept:
        kept.update({f"all.{i}": p.grad.clone() for i, p in enumerate(parameters)
                     if p.grad is not None})
_processes.sum_gradients = keeping
for pairing in ("exact", "block"):
    model = fastenc.SetFitModel.from_pretrained(folder)
    without_dropout(model.body.double() if exact else model.body)
    args = fastenc.SetFitTrainingArguments(pairing=pairing, max_steps=3, batch_size=3,
        block_steps=3, block_size=5, body_learning_rate=1e-3, show_progress_bar=False)
    kept.clear()
    fastenc.SetFitTrainer(model, args, {"text": GOOD + BAD, "label": [1] * 6 + [0] * 6}).train()
    weights = {k: v.detach() for k, v in model.body.named_parameters()}
    torch.save((dict(kept), weights), f"{out}/{pairing}-{world}-{rank}{sys.argv[7]}.pt")
"""


def test_two_processes_have_one_processs_gradients(folder, tmp_path):  # noqa: F811
    def start(rank: int, world: int, exact: str = "") -> subprocess.Popen:
        given = [str(rank), str(world), folder, str(tmp_path / "store"), str(tmp_path),
                 json.dumps([GOOD, BAD]), exact]  # fmt: skip
        return subprocess.Popen([sys.executable, "-c", SHARE, *given], cwd=ROOT)

    running = [start(0, 1), start(0, 1, "exact"), start(0, 2), start(1, 2)]
    assert [process.wait(300) for process in running] == [0, 0, 0, 0]
    for pairing in ("exact", "block"):
        one, exact, first, second = (
            torch.load(tmp_path / f"{pairing}-{name}.pt")
            for name in ("1-0", "1-0exact", "2-0", "2-1")
        )
        check_gradients([first[0]], [one[0]], [exact[0]])
        assert all(torch.equal(g, second[0][key]) for key, g in first[0].items())
        assert sum(float(g.abs().sum()) for g in one[0].values()) > 0
        for key, weight in first[1].items():
            assert torch.equal(weight, second[1][key])
            if "pooler" in key:
                assert torch.equal(weight, one[1][key]), "untouched, so no weight decay"
