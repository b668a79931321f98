"""Checkpoints of stage 1, from which training goes on as if it had not stopped.

A folder that sentence-transformers reads, and beside the model trainer_state.json (transformers'
TrainerState) and training.safetensors (AdamW's moments, torch's generators). Nothing is pickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerState

STATE, MOMENTS = "trainer_state.json", "training.safetensors"
"""The state is written last: a folder that has it is whole."""
_NAME = re.compile(r"checkpoint-(\d+)")


def find(resume: bool | str | os.PathLike | None, output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint meant: a folder, the last whole one of ``output_dir`` (True), or none.

    Raises:
        ValueError: there is none, or it has nothing to go on from.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        whole = [path for _, path in sorted(_numbered(Path(output_dir))) if not _missing(path)]
        if not whole:
            raise ValueError(f"resume_from_checkpoint: no checkpoint in {output_dir}")
        return whole[-1]
    folder = Path(resume)
    if missing := _missing(folder):
        raise ValueError(f"resume_from_checkpoint: {folder} has no {' and no '.join(missing)}")
    return folder


def _missing(folder: Path) -> list[str]:
    return [name for name in (STATE, MOMENTS) if not (folder / name).is_file()]


def _numbered(parent: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of the checkpoints in ``parent``; other names that begin so are not ours."""
    for path in parent.glob("checkpoint-*"):
        if path.is_dir() and (match := _NAME.fullmatch(path.name)):
            yield int(match[1]), path


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
    folder: Path,
    body: nn.Module,
    state: TrainerState,
    optimizer: torch.optim.Optimizer,
    callbacks: list[Any],
) -> None:
    """Write ``body`` and what goes with it into ``folder``."""
    (folder / STATE).unlink(missing_ok=True)
    body.save(folder)
    state.stateful_callbacks = {
        type(c).__name__: c.state() for c in callbacks if isinstance(c, ExportableState)
    }
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    tensors |= {f"generator.{kind}": value for kind, value in _generators(optimizer).items()}
    _write(folder / MOMENTS, lambda path: save_file(tensors, path))
    _write(folder / STATE, lambda path: state.save_to_json(str(path)))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Under a temporary name first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    device = _device(optimizer)
    if device.type == "cuda" and "generator.cuda" in generators:
        torch.cuda.set_rng_state(generators["generator.cuda"], device)


def _generators(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """States of the CPU's generator, and of that of the GPU that trains, current or not."""
    found, device = {"cpu": torch.get_rng_state()}, _device(optimizer)
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def _device(optimizer: torch.optim.Optimizer) -> torch.device:
    return next(p.device for group in optimizer.param_groups for p in group["params"])


def prune(parent: Path, limit: int | None, kept: tuple[str | Path | None, ...]) -> None:
    """Remove the oldest checkpoints beyond ``limit``, but those ``kept``."""
    if limit is None or limit <= 0:
        return
    found = sorted((path for _, path in _numbered(parent)), key=lambda p: p.stat().st_mtime)
    old = [p for p in found if str(p) not in map(str, kept)]
    for path in old[: max(0, len(found) - limit)]:
        shutil.rmtree(path)
