"""``SentenceBody``: a sentence-transformers folder as one differentiable module, packed.

    tokens -> encoder (packed) -> pooling -> Dense, Normalize ... -> (num_seqs, dimension)

Read from any folder that sentence-transformers or transformers wrote, written as a folder that
every version of sentence-transformers reads. An architecture that fastenc has no packed form of
runs padded through transformers, with a logged reason. Reimers and Gurevych 2019, arXiv:1908.10084.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastenc._encoder_folder import Recipe, read_folder, read_sentence_transformer
from fastenc._encoder_model import Runner, padding_id
from fastenc._encoder_tokens import Tokens
from fastenc._encoder_write import write_folder, writing_folder
from fastenc.encoder import Encoder
from fastenc.nn import VarlenBatch, pool
from fastenc.nn._modules import evaluating

FEW = 16
"""Up to this many texts are one batch run on the spot: no sorting, no thread, no progress bar."""
FEW_CHARACTERS = 8192
_PARTS = frozenset({"model", "head", "pooling", "tokenizer", "prompts", "default_prompt"})
"""Attributes that what is kept between calls is made of."""


class SentenceBody(nn.Module):
    """Texts or packed tokens in, one vector a text out, with gradients.

    Args:
        recipe: what a folder says; :meth:`from_folder` reads it.

    Attributes:
        model: the encoder, fastenc's class where there is one, else transformers'.
        head: ``nn.Sequential`` of the Dense and Normalize modules behind the pooling.
        pooling: names of ``fastenc.nn.POOLING_MODES``, concatenated.
        tokenizer, prompts, default_prompt: the folder's.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.model = recipe.model
        self.head = nn.Sequential(*recipe.head)
        self.pooling: tuple[str, ...] = recipe.pooling or ("mean",)
        self.tokenizer = recipe.tokenizer
        self.prompts, self.default_prompt = dict(recipe.prompts), recipe.default_prompt
        self._pool_prompt = recipe.pool_prompt
        self._max_seq_length = recipe.max_length
        self._made: dict[Any, Any] = {}
        self.train(self.model.training)

    @classmethod
    def from_folder(cls, source: str | os.PathLike) -> SentenceBody:
        """Read a folder or hub id of sentence-transformers or transformers (mean pooling then).

        Raises:
            NotImplementedError: a module or option that fastenc does not serve.
            OSError, ValueError: files are missing or contradict each other.
        """
        return cls(read_folder(os.fspath(source)))

    @classmethod
    def from_sentence_transformer(cls, model: nn.Module) -> SentenceBody:
        """The body of a live SentenceTransformer: its own modules, not copies.

        Vectors are whole: ``truncate_dim`` is left to the caller.
        """
        return cls(read_sentence_transformer(model, whole=True))

    # ---- what it is --------------------------------------------------------------------------

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        for layer in reversed(self.head):
            if isinstance(layer, nn.Sequential):
                return layer[0].out_features
        return len(self.pooling) * self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_seq_length(self) -> int | None:
        """Most tokens of a text, special ones included; longer texts are cut."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"max_seq_length: expected an int, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"max_seq_length: expected at least 1, got {value}")
        self._max_seq_length = value
        self._made.clear()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _PARTS:
            self.__dict__.get("_made", {}).clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}}

    # ---- tokens ------------------------------------------------------------------------------

    def token_ids(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, special ones included, cut at ``max_length`` tokens.

        ``max_length`` beyond ``max_seq_length`` counts as ``max_seq_length``.
        """
        return [row.tolist() for row in self._tokens(max_length)(check_texts(texts))]

    def _tokens(self, max_length: int | None = None) -> Tokens:
        limits = [n for n in (max_length, self._max_seq_length) if n is not None]
        key = ("tokens", min(limits, default=None))
        if key not in self._made:
            self._made[key] = Tokens(self.tokenizer, key[1], truncate=True)
        return self._made[key]

    # ---- vectors -----------------------------------------------------------------------------

    def forward(self, batch: VarlenBatch) -> Tensor:
        """Embed packed tokens; differentiable.

        Args:
            batch: with ``input_ids``, on the body's device.

        Returns:
            (num_seqs, dimension), dtype of the model. A sequence of no tokens pools to zeros.
        """
        return self.head(pool(self.hidden_states(batch), batch.cu_seqlens, self.pooling))

    def hidden_states(self, batch: VarlenBatch) -> Tensor:
        """The last hidden states of packed tokens, (total_tokens, hidden); differentiable."""
        if batch.input_ids is None:
            raise ValueError("batch: expected input_ids")
        runner = self._runner()
        if batch.total_tokens == 0:
            weight = next(self.model.parameters())
            return weight.new_zeros(0, self.model.config.hidden_size)
        if (packed := runner.packed()) is not None:
            return packed(batch)
        ids = batch.pad(batch.input_ids, runner.pad_id)
        mask = batch.pad(torch.ones_like(batch.input_ids))
        out = runner.base(input_ids=ids, attention_mask=mask)
        return batch.pack(out.last_hidden_state)

    def _runner(self) -> Runner:
        if "runner" not in self._made:
            self._made["runner"] = Runner(self.model, padding_id(self.tokenizer, self.model))
        return self._made["runner"]

    def encode(
        self,
        texts: str | Iterable[str],
        show_progress: bool | None = None,
        *,
        normalize: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        token_budget: int | None = None,
    ) -> np.ndarray:
        """Embed texts without gradients, in eval mode.

        Args and raises: as :meth:`fastenc.Encoder.encode`; ``normalize``: to length 1.

        Returns:
            float32, (n, dimension) in input order; (dimension,) for a single string.
        """
        few = [texts] if isinstance(texts, str) else texts
        plain = prompt == "" or (prompt is prompt_name is self.default_prompt is None)
        if (
            plain
            and not show_progress
            and isinstance(few, list)
            and 0 < len(few) <= FEW
            and all(isinstance(text, str) for text in few)
            and sum(map(len, few)) <= FEW_CHARACTERS
        ):
            rows = self._encode_few(few, normalize)
            return rows[0] if isinstance(texts, str) else rows
        return self._encoder(normalize).encode(
            texts, show_progress, prompt=prompt, prompt_name=prompt_name, token_budget=token_budget
        )

    @torch.inference_mode()
    def _encode_few(self, texts: list[str], normalize: bool) -> np.ndarray:
        batch = VarlenBatch.from_lists([row.tolist() for row in self._tokens()(texts)])
        with evaluating(self):
            rows = self(batch.to(self.device)).float()
        if normalize:
            rows = nn.functional.normalize(rows, dim=-1)
        return rows.cpu().numpy()

    def _encoder(self, normalize: bool) -> Encoder:
        key = ("encoder", normalize)
        if key not in self._made:
            self._made[key] = Encoder(self.recipe(), normalize=normalize)
        return self._made[key]

    def recipe(self) -> Recipe:
        """The parts, as :class:`fastenc.Encoder` takes them."""
        return Recipe(
            self.model,
            self.tokenizer,
            self.pooling,
            list(self.head),
            self._max_seq_length,
            self.prompts,
            self.default_prompt,
            self._pool_prompt,
        )

    # ---- files -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write a folder that any sentence-transformers reads, and nothing that only fastenc does.

        Every file is written under a temporary name first: an interrupted save loses nothing.
        """
        with writing_folder(path) as folder:
            write_folder(folder, self.recipe())


def check_texts(texts: Any) -> list[str]:
    """``texts`` as a list, after each was found to be a string.

    Raises:
        TypeError: naming the first that is none.
    """
    if isinstance(texts, (str, bytes, dict)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected strings, got {type(texts).__name__}")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__} at index {i}")
    return texts
