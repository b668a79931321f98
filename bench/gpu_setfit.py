"""SetFit's stage 1 on a GPU, exact and block, beside setfit's loop in plain transformers and torch
(each pair's two texts encoded apart, padded), so that the GPU machine needs no setfit."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable

import numpy as np
import torch

import fastenc
from bench.gpu_embedding import build
from bench.gpu_record import Found, Record
from bench.gpu_timing import CUDA, DEVICE, median_of, wall_seconds
from fastenc.train._setfit_pairs import counts

CLASSES, SHOTS, LONGEST, ROUNDS = (6, 8, 40, 3) if CUDA else (2, 2, 8, 1)
BATCH = 16


def examples() -> tuple[list[str], list[int]]:
    """Texts of 5 to LONGEST words; each class has words of its own."""
    random = np.random.default_rng(0)
    texts, labels = [], []
    for label in range(CLASSES):
        for _ in range(SHOTS):
            words = random.integers(0, 300, random.integers(5, LONGEST + 1)) + 200 * label
            texts.append(" ".join(f"w{i}" for i in words))
            labels.append(label)
    return texts, labels


def ours(folder: str, pairing: str) -> float:
    """Seconds of stage 1."""
    texts, labels = examples()
    head = {"use_differentiable_head": True, "head_params": {"out_features": CLASSES}}
    model = fastenc.SetFitModel.from_pretrained(folder, device=DEVICE, **head)
    args = fastenc.SetFitTrainingArguments(
        pairing=pairing, num_epochs=(1, 1), batch_size=(BATCH, 2), show_progress_bar=False
    )
    trainer = fastenc.SetFitTrainer(model, args, {"text": texts, "label": labels})
    return wall_seconds(trainer.train_embeddings)


def theirs(folder: str) -> float:
    """Seconds of as many pairs as setfit draws, in setfit's loop."""
    from transformers import AutoModel, AutoTokenizer

    texts, labels = examples()
    model = AutoModel.from_pretrained(folder).to(DEVICE).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = counts(np.asarray(labels), "oversampling").drawn
    random = np.random.default_rng(0)
    steps = -(-drawn // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=CUDA)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    def embed(rows: np.ndarray) -> torch.Tensor:
        given = tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt").to(DEVICE)
        hidden = model(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1).float()
        return (hidden * mask).sum(1) / mask.sum(1)

    def train() -> None:
        for _ in range(steps):
            a, b = random.integers(0, len(texts), (2, BATCH))
            target = torch.tensor(
                [float(labels[i] == labels[j]) for i, j in zip(a, b, strict=True)]
            )
            similarity = torch.cosine_similarity(embed(a), embed(b))
            loss = torch.nn.functional.mse_loss(similarity, target.to(DEVICE))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return wall_seconds(train)


def save(folder: str) -> None:
    model, tokenizer = build()
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(record: Record) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = functools.cache(lambda: save(folder))
        runners: dict[str, Callable[[], float]] = {
            "fastenc, exact": lambda: ours(folder, "exact"),
            "fastenc, block": lambda: ours(folder, "block"),
            "setfit's loop": lambda: theirs(folder),
        }
        shape = f"{CLASSES} classes x {SHOTS} shots, MiniLM shape"
        row = record.row("setfit", model="SetFit, stage 1", shape=shape)

        def time(run: Callable[[], float], found: Found) -> None:
            saved()
            found["seconds"] = median_of(run, ROUNDS, record.deadline)

        for name, run in runners.items():
            record.run(row, name, functools.partial(time, run))
    shown = " | ".join(f"{n} {r.get('seconds', r.get('error'))}" for n, r in row["runs"].items())
    print(f"{row['model']}, {shape}: {shown}", flush=True)
