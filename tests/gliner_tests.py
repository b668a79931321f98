"""Models of the gliner package with random weights, made of nothing: what GLiNER is held to."""

from __future__ import annotations

import copy
import warnings

import torch

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 48}  # fmt: skip
BACKBONES = {
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
        "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "position_biased_input": False, "type_vocab_size": 0, "max_position_embeddings": 64,
    },
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 16, "pad_token_id": 0,
                       "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "bert": {"max_position_embeddings": 512},
    "roberta": {"max_position_embeddings": 514, "pad_token_id": 0, "type_vocab_size": 1},
}  # fmt: skip
CORPUS = (
    "The quick brown fox jumps over the lazy dog while Marie Curie works in Paris for Siemens AG.",
    "Die Straße in München, la città di Torino, São Paulo, Владимир Путин, 東京都, 서울, القاهرة",
    "person company city date email phone product organization location 2024-01-31 a@b.org",
)


def tokenizer(vocab_size: int = 400, **given):
    """A byte-level BPE tokenizer with [CLS] and [SEP] around every sequence: any text, no unk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "cls", "sep", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, **given)


def their_model(
    backbone: str = "deberta-v2", seed: int = 0, encoder=None, labels=None, decisive: bool = False,
    **config,
):  # fmt: skip
    """A model of gliner's in evaluation mode.

    ``encoder``: overrides of the backbone's config. ``labels``: the label encoder's kind, which
    makes it a bi-encoder. ``decisive``: see :func:`spread`. ``config``: overrides of gliner's.
    """
    from gliner import GLiNER, GLiNERConfig

    torch.manual_seed(seed)
    tok = tokenizer()

    def encoder_config(kind, overrides=None):
        values = {**SIZES, **BACKBONES[kind], **(overrides or {})}
        return {"model_type": kind, "vocab_size": len(tok), **values}

    given = {
        "model_name": "none", "hidden_size": 32, "max_width": 5, "dropout": 0.3, "max_len": 384,
        "encoder_config": encoder_config(backbone, encoder), **config,
    }  # fmt: skip
    extra = {}
    if labels is not None:
        given["labels_encoder"] = "none"
        extra = {"labels_tokenizer": tokenizer(model_max_length=64)}  # gliner pads labels to it
        given["labels_encoder_config"] = encoder_config(labels)
    kind = GLiNER._get_gliner_class(GLiNERConfig(**copy.deepcopy(given)))
    made = kind.config_class(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(made, tokenizer=tok, backbone_from_pretrained=False, **extra)
        if labels is None:
            model._resize_token_embeddings(model, model.config, tok)
    spread(model.model, decisive)
    model.eval()
    if decisive and made.span_mode == "token_level":
        centre(model)
    return model


def spread(model: torch.nn.Module, decisive: bool, seed: int = 0) -> None:
    """Weights with which scores differ: gliner's heads start near a constant.

    ``decisive``: attention is sharp enough that labels do not look alike, and the LSTM tells words
    apart; rounding grows with it.
    """
    scales = {"rnn": 3.0, "query": 2.0, "key": 2.0, "Wqkv": 2.0} if decisive else {}
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            encoder = "token_rep_layer" in name and "projection" not in name
            if p.dim() < 2:
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
            elif encoder and "embeddings" in name:
                p.copy_(torch.randn(p.shape, generator=g))
            else:
                scale = (1.0, 1.4)[not encoder] if decisive else (0.8, 1.2)[not encoder]
                scale = next((s for part, s in scales.items() if part in name), scale)
                p.copy_(torch.randn(p.shape, generator=g) * (scale / p.shape[1] ** 0.5))


def centre(model) -> None:
    """A token-level head that finds starts, ends and insides as often as not."""
    labels = ["person", "company name", "e-mail"]
    with torch.no_grad():
        logits, _ = their_logits(model, [sentence.split() for sentence in CORPUS], labels)
        model.model.scorer.out_mlp[-1].bias -= logits.mean((0, 1))


def ours(theirs, folder, safe: bool = True):
    """fastenc's GLiNER of the files that gliner writes."""
    import fastenc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder, safe_serialization=safe)
    return fastenc.GLiNER.from_pretrained(folder)


def collated(theirs, words, labels):
    """gliner's own padded batch of lists of words; labels: one list, or a list for each text."""
    rows = [{"tokenized_text": list(text), "ner": None} for text in words]
    return theirs.collate_batch(rows, labels)


def their_logits(theirs, words, labels, **inputs):
    """gliner's logits, packed: (words, ...) of every text, in order, and the padded output."""
    batch = collated(theirs, words, labels)
    out = theirs.model(**batch, **inputs)
    parts = [out.logits[i, : len(text)] for i, text in enumerate(words)]
    return torch.cat(parts), out
