"""Checkpoints of stage 1, from which training goes on as if it had not stopped.

A folder that sentence-transformers reads, and beside the model trainer_state.json (transformers'
TrainerState) and training.safetensors (AdamW's moments, torch's generators). Nothing is pickled.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import get_last_checkpoint

STATE, MOMENTS = "trainer_state.json", "training.safetensors"


def find(resume: bool | str | os.PathLike | None, output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint meant: a folder, the last one of ``output_dir`` (True), or none.

    Raises:
        ValueError: there is none, or it has nothing to go on from.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        found = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if found is None:
            raise ValueError(f"resume_from_checkpoint: no checkpoint in {output_dir}")
        resume = found
    folder = Path(resume)
    missing = [name for name in (STATE, MOMENTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"resume_from_checkpoint: {folder} has no {' and no '.join(missing)}")
    return folder


def read_state(folder: Path, steps: int) -> TrainerState:
    """The state of a checkpoint.

    Raises:
        ValueError: it is of a run of another number of steps than ``steps``.
    """
    state = TrainerState.load_from_json(str(folder / STATE))
    if state.max_steps != steps:
        raise ValueError(
            f"resume_from_checkpoint: {folder} is of a run of {state.max_steps} steps, this one "
            f"has {steps}: the data or the arguments have changed"
        )
    return state


def save(
    folder: Path, state: TrainerState, optimizer: torch.optim.Optimizer, callbacks: list[Any]
) -> None:
    """Write what is not the model's into ``folder``."""
    state.stateful_callbacks = {
        type(c).__name__: c.state() for c in callbacks if isinstance(c, ExportableState)
    }
    state.save_to_json(str(folder / STATE))
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    tensors |= {f"generator.{kind}": value for kind, value in _generators().items()}
    save_file(tensors, folder / MOMENTS)


def load(
    folder: Path, state: TrainerState, optimizer: torch.optim.Optimizer, callbacks: list[Any]
) -> None:
    """Put back what :func:`save` wrote, but the state, which is read first.

    Raises:
        ValueError: the moments are of other parameters.
    """
    tensors = load_file(folder / MOMENTS)
    generators = {k: tensors.pop(k) for k in list(tensors) if k.startswith("generator.")}
    held = optimizer.state_dict()
    held["state"] = {}
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        held["state"].setdefault(int(place), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in held["state"].items():
        if i >= len(parameters) or values["exp_avg"].shape != parameters[i].shape:
            raise ValueError(
                f"resume_from_checkpoint: {folder} is of other training texts or another model"
            )
    optimizer.load_state_dict(held)
    for callback in callbacks:
        saved = state.stateful_callbacks.get(type(callback).__name__)
        if isinstance(callback, ExportableState) and saved:
            for name, value in saved["attributes"].items():
                setattr(callback, name, value)
    torch.set_rng_state(generators["generator.cpu"])
    if torch.cuda.is_available() and "generator.cuda" in generators:
        torch.cuda.set_rng_state(generators["generator.cuda"])


def _generators() -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def prune(parent: Path, limit: int | None, kept: tuple[str | Path | None, ...]) -> None:
    """Remove the oldest checkpoints beyond ``limit``, but those ``kept``."""
    if limit is None or limit <= 0:
        return
    found = sorted(parent.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
    old = [p for p in found if str(p) not in map(str, kept)]
    for path in old[: max(0, len(found) - limit)]:
        shutil.rmtree(path)
