"""Ray Data: embed a dataset of texts with one :class:`fastenc.Encoder` in each actor.

    import ray
    from fastenc.integrations.ray import embed

    vectors = embed(ray.data.read_parquet("texts/"), "path/to/all-MiniLM-L6-v2", num_gpus=1)

Ray itself is imported only by :func:`embed` (``pip install fastenc[ray]``).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from fastenc.encoder import Encoder

if TYPE_CHECKING:
    from ray.data import Dataset


class Embed:
    """A callable class for ``ray.data.Dataset.map_batches``: loads its model once, in its actor.

    Args:
        model: a folder or hub id, as of :class:`fastenc.Encoder`.
        column: the column that holds the texts.
        output: the column that receives the vectors, float32 (rows, dimension).
        device: where the model runs; None: "cuda" in an actor that was given a GPU, else "cpu".
        options: further arguments of :class:`fastenc.Encoder`.

    Raises:
        KeyError: a batch has no such column; the message lists what it has.
        TypeError: a text is missing, or no string.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        column: str = "text",
        output: str = "embedding",
        device: str | None = None,
        **options: Any,
    ) -> None:
        import torch

        self.column, self.output = column, output
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder = Encoder(os.fspath(model), **options).to(device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.column not in batch:
            raise KeyError(f"column {self.column!r}: the batch has {', '.join(sorted(batch))}")
        texts = [str(x) if isinstance(x, str) else x for x in batch[self.column]]
        return {**batch, self.output: self.encoder.encode(texts, show_progress=False)}


def embed(
    dataset: Dataset,
    model: str | os.PathLike,
    column: str = "text",
    output: str = "embedding",
    *,
    batch_size: int = 1024,
    concurrency: int | tuple[int, int] = 1,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **options: Any,
) -> Dataset:
    """``dataset`` with a column of vectors; runs when the dataset is consumed.

    Args:
        dataset: of Ray Data. model, column, output, options: as of :class:`Embed`.
        batch_size: rows a call: the encoder sorts and packs within them, so that more is better.
        concurrency, num_cpus, num_gpus: actors and what each gets, as of ``map_batches``. Torch
            takes as many threads as Ray gives the actor CPUs.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError("embed needs Ray Data: pip install fastenc[ray]") from error
    return dataset.map_batches(
        Embed,
        fn_constructor_args=(os.fspath(model), column, output),
        fn_constructor_kwargs=options,
        batch_size=batch_size,
        concurrency=concurrency,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
