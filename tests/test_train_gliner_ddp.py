"""Two processes take the gradients of one."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import gliner_tests
import pytest
import torch
from model_tests import check_trained

HERE = Path(__file__).parent


def steps(
    rank: int,
    world: int,
    port: int,
    model_folder: str,
    out: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """One SGD step on eight texts under each reduction; weights go to ``out``."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    from test_train_gliner import arguments, examples

    import fastenc
    from fastenc.train import GLiNERTrainer

    rows = examples(16, ner_labels=["city", "person"])
    for reduction in ("sum", "mean"):
        model = fastenc.GLiNER.from_pretrained(model_folder).to(dtype)
        args = arguments(
            Path(out) / "run", per_device_train_batch_size=8 // world, max_steps=1, optim="sgd",
            learning_rate=0.01, max_grad_norm=0.0, loss_reduction=reduction, eval_threshold=0.3,
            per_device_eval_batch_size=3, **({"ddp_backend": "gloo"} if world > 1 else {}),
        )  # fmt: skip
        trainer = GLiNERTrainer(model, args, rows, examples(7, seed=3))
        trainer.train()
        scores = trainer.evaluate()
        if rank == 0:
            state = {k: x.detach() for k, x in model.state_dict().items()}
            loss = next(r["loss"] for r in trainer.state.log_history if "loss" in r)
            found = {"state": state, "loss": loss, "f1": scores["eval_f1"]}
            torch.save(found, Path(out) / f"{reduction}-{world}-{dtype}.pt")
    if world > 1:
        torch.distributed.barrier()
        # torch can deadlock when DDP's reducer is freed (gloo waits for the GIL): leave at once
        os._exit(0)


@pytest.mark.timeout(400)
def test_two_processes_take_the_step_of_one(tmp_path):
    from test_train_gliner import steady_model

    folder = tmp_path / "model"
    before = gliner_tests.ours(steady_model(), folder).state_dict()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = torch.multiprocessing.spawn(
        steps, (2, port, str(folder), str(tmp_path)), nprocs=2, join=False
    )
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.float64):  # while they start
        steps(0, 1, port, str(folder), str(tmp_path), dtype)
    torch.set_num_threads(threads)
    while not pair.join():
        pass
    for reduction in ("sum", "mean"):
        one, two, exact = (
            torch.load(tmp_path / f"{reduction}-{n}-{dtype}.pt")
            for n, dtype in ((1, torch.float32), (2, torch.float32), (1, torch.float64))
        )
        rounding = 4 * torch.finfo(torch.float32).eps * abs(exact["loss"])  # a loss is one number
        assert abs(two["loss"] - exact["loss"]) <= 2 * abs(one["loss"] - exact["loss"]) + rounding
        assert one["f1"] == two["f1"]
        states = [{k: x for k, x in run["state"].items() if x.is_floating_point()}
                  for run in (two, one, exact)]  # fmt: skip
        check_trained(*states, before)
        assert sum(not torch.equal(x, before[name]) for name, x in one["state"].items()) > 20
