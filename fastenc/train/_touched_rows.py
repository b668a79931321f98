"""Token embeddings while training: only the rows that some training text uses.

Half of MiniLM's parameters are token embeddings, of which a few-shot run touches one in a hundred.
AdamW still reads and writes weight, gradient and two moments of every row in every step. A row that
no text uses has gradient zero and moments zero: all that AdamW ever does to it is weight decay, a
product of (1 - lr * decay) over the steps, which is applied once at the end. Same weights, no
optimizer state, no gradient for the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TouchedRows(nn.Embedding):
    """An embedding whose parameter is the rows ``used`` of another's.

    Args:
        whole: the embedding to stand for; it is not changed before :meth:`write_back`.
        used: (n,) int64, ascending.
    """

    def __init__(self, whole: nn.Embedding, used: Tensor):
        super().__init__(1, 1, device="meta")
        self.num_embeddings, self.embedding_dim = whole.weight.shape
        self.padding_idx = whole.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq = None, 2.0, False
        self.weight = nn.Parameter(whole.weight.detach()[used].clone())
        self.used = used
        place = torch.full((self.num_embeddings,), -1, dtype=torch.int64, device=used.device)
        place[used] = torch.arange(len(used), device=used.device)
        self.place = place
        self.decayed = 1.0
        padding = -1 if whole.padding_idx is None else int(place[whole.padding_idx])
        self._padding_row = padding if padding >= 0 else None

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape, all among ``used`` -> (..., embedding_dim)."""
        return F.embedding(self.place[ids], self.weight, self._padding_row)

    def decay(self, rate: float, weight_decay: float) -> None:
        """Note a step of AdamW for the rows that are left out."""
        self.decayed *= 1.0 - rate * weight_decay

    @torch.no_grad()
    def write_back(self, whole: nn.Embedding) -> None:
        """Put what was trained into ``whole``; the decay of the other rows counts once."""
        whole.weight.mul_(self.decayed)
        whole.weight[self.used] = self.weight.to(whole.weight.dtype)
        self.decayed = 1.0


def servable(embedding: object) -> bool:
    """Whether :class:`TouchedRows` does all that this embedding does."""
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
        and embedding.weight.requires_grad
        and not any((embedding._forward_hooks, embedding._forward_pre_hooks))
    )


class Embeddings:
    """The token embeddings of a model in training, whole again for saving.

    Args:
        model: with transformers' ``get_input_embeddings`` and ``set_input_embeddings``.
        mode: "touched", "all" or "frozen".
        token_lists: every text that the model will see meanwhile.
    """

    def __init__(self, model: nn.Module, mode: str, token_lists: Sequence[Sequence[int]]):
        self.model = model
        self.whole = model.get_input_embeddings()
        self.rows: TouchedRows | None = None
        self._froze = mode == "frozen" and self.whole.weight.requires_grad
        if self._froze:
            self.whole.weight.requires_grad_(False)
        elif mode == "touched" and servable(self.whole):
            used = sorted({int(token) for tokens in token_lists for token in tokens})
            if 0 < len(used) < self.whole.num_embeddings:
                at = torch.tensor(used, device=self.whole.weight.device)
                self.rows = TouchedRows(self.whole, at)
                self.rows.train(self.whole.training)
                model.set_input_embeddings(self.rows)

    def decay(self, rate: float, weight_decay: float) -> None:
        if self.rows is not None:
            self.rows.decay(rate, weight_decay)

    @contextlib.contextmanager
    def made_whole(self) -> Iterator[None]:
        """The model with its full table inside the ``with``, as it stands now."""
        if self.rows is None:
            yield
            return
        self.rows.write_back(self.whole)
        self.model.set_input_embeddings(self.whole)
        try:
            yield
        finally:
            self.model.set_input_embeddings(self.rows)

    def close(self) -> None:
        """The model as it was, trained."""
        if self._froze:
            self.whole.weight.requires_grad_(True)
        if self.rows is not None:
            self.rows.write_back(self.whole)
            self.model.set_input_embeddings(self.whole)
            self.rows = None


@contextlib.contextmanager
def training_embeddings(
    model: nn.Module, mode: str, token_lists: Sequence[Sequence[int]]
) -> Iterator[Embeddings]:
    """:class:`Embeddings` for the time of the ``with``; whole again also after an error."""
    held = Embeddings(model, mode, token_lists)
    try:
        yield held
    finally:
        held.close()
