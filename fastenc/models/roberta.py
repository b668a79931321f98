"""RoBERTa and XLM-R: ``bert_packed`` with positions counted from token ids."""

from __future__ import annotations

from torch import Tensor
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta

from fastenc.models._post_norm import post_norm_forward
from fastenc.models.bert import PackedBert, bert_slots


class PackedRoberta(PackedBert):
    """``bert_packed`` in front of a transformers base model of the RoBERTa family."""

    def _implied_positions(self, input_ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """Counted over the padded rows, as transformers does, so that masks of any kind agree."""
        if input_ids is None:
            return self.embeddings.position_ids[:, : shape[1]] + self.embeddings.padding_idx + 1
        return self.embeddings.create_position_ids_from_input_ids(
            input_ids, self.embeddings.padding_idx
        )


class RobertaModel(PackedRoberta, roberta.RobertaModel):
    """transformers' RobertaModel, padding-free inside."""

    _slots = bert_slots(roberta, "Roberta")
    forward = post_norm_forward(roberta.RobertaModel)


class XLMRobertaModel(PackedRoberta, xlm_roberta.XLMRobertaModel):
    """transformers' XLMRobertaModel, padding-free inside."""

    _slots = bert_slots(xlm_roberta, "XLMRoberta")
    forward = post_norm_forward(xlm_roberta.XLMRobertaModel)
