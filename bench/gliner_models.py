"""Random models of the gliner package at real shapes, and texts for them."""

from __future__ import annotations

import copy
import random
import warnings

import torch

DEBERTA_V3 = {
    "model_type": "deberta-v2", "hidden_size": 768, "num_attention_heads": 12,
    "intermediate_size": 3072, "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"], "position_buckets": 256,
    "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "position_biased_input": False, "type_vocab_size": 0, "max_position_embeddings": 512,
}  # fmt: skip
ETTIN_32M = {
    "model_type": "modernbert", "hidden_size": 384, "num_attention_heads": 6,
    "intermediate_size": 576,
    "global_attn_every_n_layers": 3, "local_attention": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
LABELS = (
    "person", "company", "city", "date", "product", "country", "email", "phone number", "event",
    "law", "disease", "drug", "animal", "plant", "book", "film", "song", "sport", "team", "river",
    "mountain", "currency", "language", "weapon", "vehicle",
)  # fmt: skip


def vocabulary(count: int = 3000, seed: int = 0) -> list[str]:
    """Pseudo-words of one to four syllables."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(count)]


def text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(vocabulary(), k=words))


def tokenizer():
    """Byte-level BPE, trained so that a pseudo-word takes about 1.3 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3200, special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([*vocabulary(), *LABELS], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "cls", "sep", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def their_model(encoder: dict, layers: int, hidden: int, **config):
    """A uni-encoder of gliner's in evaluation mode, with weights under which scores differ."""
    from gliner import GLiNER, GLiNERConfig

    torch.manual_seed(0)
    tok = tokenizer()
    given = {
        "model_name": "none", "hidden_size": hidden, "max_width": 12, "dropout": 0.4,
        "encoder_config": {**encoder, "num_hidden_layers": layers, "vocab_size": len(tok)},
        **config,
    }  # fmt: skip
    kind = GLiNER._get_gliner_class(GLiNERConfig(**copy.deepcopy(given)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(kind.config_class(**given), tokenizer=tok, backbone_from_pretrained=False)
        model._resize_token_embeddings(model, model.config, tok)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.model.named_parameters():
            if p.dim() > 1 and "embeddings" in name:
                p.copy_(torch.randn(p.shape, generator=g))
            elif p.dim() > 1:
                scale = 0.8 if "bert_layer" in name else 1.4
                p.copy_(torch.randn(p.shape, generator=g) * scale / p.shape[1] ** 0.5)
    return model.eval()


def threshold_of(model, texts: list[str], labels: list[str], share: float = 0.004) -> float:
    """The probability that this share of a model's scores exceeds."""
    first = [sorted(texts, key=len)[-1]]
    prepared = model.prepare_batch(first, labels)
    with torch.inference_mode():
        batch = model.collate_batch(prepared["input_x"], prepared["entity_types"])
        scores = torch.sigmoid(model.run_batch(batch)[0]).flatten()
    if model.config.span_mode == "token_level":
        return 0.5
    return round(float(scores.kthvalue(int(len(scores) * (1 - share))).values), 4)
