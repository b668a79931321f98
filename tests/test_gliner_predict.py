"""GLiNER's entities against the gliner package's, and what fastenc does differently on purpose."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from threading import Event, Thread

import gliner_tests
import numpy as np
import pytest
import torch
from gliner_decisions import decided

import fastenc
from fastenc import _C
from fastenc.models import _gliner_api
from fastenc.models import _gliner_plan as plan

LABELS = ["person", "city", "company name", "date", "e-mail address"]
PIECES = (
    "Marie Curie", "works at", "Siemens AG", "in München", "東京都で", "работает в Москве",
    "שלום עולם", "مرحبا بالعالم", "🚀🔥", "👩\u200d👩\u200d👧 family", "a@b.org", "2024-01-31",
    "naïve café", "हिन्दी भाषा", "한국어 문장", "e\u0301clair", "state-of-the-art",
    "snake_case_name", "(brackets)", "“quotes”", "x", "…", "1,234.5 €",
)  # fmt: skip


SPECIAL = ("", " \n\t", "word", "🚀", "東京", ".", " padded  by   blanks ")


def texts(seed: int = 0) -> Iterator[str]:
    """Mixed scripts, lengths from nothing to 600 words, blank ones and single words, for ever."""
    draw = random.Random(seed)
    yield from SPECIAL
    for count in itertools.count(len(SPECIAL)):
        length = 230 if count in (12, 13) else draw.choice([1, 2, 3, 5, 8, 13, 30, 40])
        space = draw.choice([" ", "  ", "\n", " , "])
        yield space.join(draw.choice(PIECES) for _ in range(length))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(gliner's, fastenc's) span models with the same weights."""
    theirs = gliner_tests.their_model(decisive=True)
    return theirs, gliner_tests.ours(theirs, tmp_path_factory.mktemp("span"))


def same(ours, theirs):
    """The same entities, fields and all, in the same order; scores to fp32 rounding."""
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert [exact(e) for e in a] == [exact(e) for e in b], i
        assert [list(e) for e in a] == [list(e) for e in b], i
        np.testing.assert_allclose(
            [scores(e) for e in a], [scores(e) for e in b], atol=2e-5, rtol=0
        )


def exact(entity: dict) -> dict:
    return {k: v for k, v in entity.items() if k not in ("score", "class_probs")}


def scores(entity: dict) -> list[float]:
    return [entity["score"], *entity.get("class_probs", {}).values()]


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 200), ({"flat_ner": False}, 40), ({"multi_label": True}, 40),
     ({"flat_ner": False, "multi_label": True}, 40), ({"threshold": 0.1}, 40)],
    ids=str,
)  # fmt: skip
def test_identical_entities(models, options, count):
    theirs, ours = models
    asked = decided(theirs, texts(), count, LABELS, **options)
    assert (
        set(SPECIAL) <= set(asked) and max(len(plan.split_words(text)[0]) for text in asked) > 384
    )
    with fastenc.record() as ran:
        found = ours.inference(asked, LABELS, truncate=True, **options)
    expected = theirs.inference(asked, LABELS, batch_size=4, **options)
    assert sum(map(len, expected)) > 3 * len(asked)
    assert {e["label"] for entities in expected for e in entities} == {*LABELS}
    same(found, expected)
    assert ran.fallbacks == [] and ran.calls["span_candidates"]["cpu"] >= 1
    for text, entities in zip(asked, found, strict=True):
        assert all(text[e["start"] : e["end"]] == e["text"] for e in entities)


@pytest.mark.parametrize(
    "given",
    [{"backbone": "modernbert"}, {"backbone": "bert"}, {"backbone": "roberta"},
     {"span_mode": "token_level"}, {"span_mode": "marker", "subtoken_pooling": "mean"}],
    ids=str,
)  # fmt: skip
def test_identical_entities_of_other_models(given, tmp_path):
    theirs = gliner_tests.their_model(decisive=True, **given)
    asked = decided(theirs, (text[:160] for text in texts(seed=1)), 40, LABELS)
    expected = theirs.inference(asked, LABELS, batch_size=8)
    assert sum(map(len, expected)) > 40
    with fastenc.record() as ran:
        same(gliner_tests.ours(theirs, tmp_path).inference(asked, LABELS), expected)
    assert ran.fallbacks == []


# ---- decoding against gliner's decoder ----------------------------------------------------------


def candidates(draw, count, words, labels, levels):
    """Distinct (start, end, label) with scores from few levels, so that many tie."""
    found = {}
    for _ in range(count):
        start = draw.randrange(words)
        end = min(words - 1, start + draw.randrange(6))
        found[start, end, draw.randrange(labels)] = draw.randrange(1, levels + 1) / levels
    return [(s, e, c, p) for (s, e, c), p in sorted(found.items())]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("multi_label", [True, False])
def test_selection_is_gliners_greedy_search(flat, multi_label):
    from gliner.decoding.decoder import Span, SpanDecoder

    draw = random.Random(7)
    decoder = SpanDecoder(None)
    for trial in range(300):
        group = [
            candidates(draw, draw.randrange(40), draw.randrange(1, 25), 3, draw.choice([2, 5, 999]))
            for _ in range(draw.randrange(1, 4))
        ]
        flattened = [c for text in group for c in text]
        edges = np.cumsum([0, *map(len, group)])
        columns = [np.array(x) for x in zip(*flattened, strict=True)] or [np.empty(0)] * 4
        start, end, _, score = columns
        chosen, cuts = _C.select_spans(start, end, score, edges, flat, multi_label)
        for i, text in enumerate(group):
            spans = [Span(s, e, str(c), p) for s, e, c, p in text]
            expected = decoder.greedy_search(spans, flat, multi_label=multi_label)
            found = [flattened[k] for k in chosen[cuts[i] : cuts[i + 1]]]
            assert [(x.start, x.end, int(x.entity_type), x.score) for x in expected] == found, trial


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.0])
def test_token_spans_are_gliners(threshold):
    from gliner.decoding.decoder import TokenDecoder

    g = torch.Generator().manual_seed(0)
    lengths, names = [7, 1, 12, 0], {i + 1: f"l{i}" for i in range(4)}
    logits = torch.randn(4, 12, 4, 3, generator=g) + 0.5
    expected = TokenDecoder(None)
    edges = np.cumsum([0, *lengths])
    packed = torch.cat([torch.sigmoid(logits[i, :n]) for i, n in enumerate(lengths)])
    found = _C.token_spans(packed.numpy(), edges, np.array([4, 4, 3, 4]), threshold)
    start, end, label, score, cuts = found
    for i, n in enumerate(lengths):
        used = {k: v for k, v in names.items() if i != 2 or k < 4}
        x = logits[i, :n]
        theirs = expected._calculate_span_score(
            *(expected._get_indices_above_threshold(x[:, : len(used), k], threshold)
              for k in (0, 1)),
            *(torch.sigmoid(x[..., k]) for k in (2, 0, 1)), used, threshold,
        )  # fmt: skip
        rows = slice(cuts[i], cuts[i + 1])
        ours = zip(start[rows], end[rows], label[rows], strict=True)
        assert [(a, b, f"l{c}") for a, b, c in ours] == [
            (x.start, x.end, x.entity_type) for x in theirs
        ]
        np.testing.assert_allclose(score[rows], [x.score for x in theirs], rtol=1e-6)


def test_decoding_refuses_nonsense():
    one = np.array([0])
    for args, words in (
        ((one, one, np.array([float("nan")]), [0, 1]), "number"),
        ((one + 1, one, np.array([0.5]), [0, 1]), "start <= end"),
        ((one, one, np.array([0.5]), [0, 2]), "edges"),
        ((one, np.array([0, 1]), np.array([0.5]), [0, 1]), "one length"),
    ):
        with pytest.raises(ValueError, match=words):
            _C.select_spans(*args, True, False)
    with pytest.raises(ValueError, match="words, labels, 3"):
        _C.token_spans(np.zeros((2, 3)), [0, 2], [3], 0.5)


# ---- windows and passes --------------------------------------------------------------------------


@pytest.mark.parametrize("room", [None, 9, 1])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 30, 101])
def test_every_word_is_owned_once_and_every_span_is_inside_its_window(count, room):
    draw = random.Random(count)
    sizes = [draw.choice([1, 1, 2, 30]) for _ in range(count)]
    width, owned = 3, []
    for w in plan.windows(sizes, 16, width, room):
        assert 0 <= w.first <= w.own_first <= w.own_stop <= w.stop <= count
        assert w.stop - w.first <= 16
        owned += range(w.own_first, w.own_stop)
        if room is None and w.stop < count:
            assert w.own_stop + width - 1 <= w.stop
        if room is not None and w.stop - w.first > 1:
            assert sum(sizes[w.first : w.stop]) <= room
    assert owned == [*range(count)]


def test_long_texts_are_read_whole_or_cut_and_said_so(models, caplog):
    _, ours = models
    long = " ".join(f"word{i}" for i in range(1000))
    entities, cut = ours.inference([long, "short text"], LABELS, threshold=0.3, truncate=True,
                                   return_cut=True)  # fmt: skip
    assert cut == [1000 - 384, 0] and "616" in caplog.text
    assert max(e["end"] for e in entities[0]) <= long.index(" word384")
    whole, nothing = ours.inference([long], LABELS, threshold=0.3, return_cut=True)
    assert nothing == [0] and max(e["end"] for e in whole[0]) > long.index("word990")
    assert all(long[e["start"] : e["end"]] == e["text"] for e in whole[0])
    ends = [(e["start"], e["end"]) for e in whole[0]]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


def test_a_window_sees_what_the_same_words_alone_would(models):
    """The words that the first window owns score as the first 384 words by themselves."""
    _, ours = models
    long = " ".join(f"word{i}" for i in range(500))
    own = plan.windows([1] * 500, 384, 5)[0].own_stop
    limit = long.index(f"word{own - 10}")
    first = ours.predict_entities(long, LABELS, threshold=0.4, truncate=True)
    whole = ours.predict_entities(long, LABELS, threshold=0.4)
    assert [e["start"] for e in whole if e["end"] < limit] == [
        e["start"] for e in first if e["end"] < limit
    ]


def test_thousands_of_labels_in_passes(models):
    """Of one word, whose spans cannot overlap, what is found is what each pass by itself finds."""
    _, ours = models
    labels = [f"label {i}" for i in range(2530)]
    assert [p.count for p in plan.even_passes(250, 100)] == [83, 83, 84]
    sizes = [p.count for p in plan.even_passes(2530, 100)]
    assert len(sizes) == 26 and sum(sizes) == 2530
    edges = np.cumsum([0, *sizes])
    options = {"threshold": 0.2, "flat_ner": False, "multi_label": True}
    for text in ("Marie", "東京"):
        found = ours.predict_entities(text, labels, **options)
        alone = []
        for first, stop in itertools.pairwise(edges):
            alone += ours.predict_entities(text, labels[first:stop], **options)

        def key(e):
            return e["start"], e["end"], e["label"]

        assert len(found) == len(alone) > 100
        assert {key(e) for e in found} == {key(e) for e in alone}
        assert len({e["label"] for e in found}) > 50


# ---- arguments -----------------------------------------------------------------------------------


def test_labels_of_each_text_and_descriptions(models):
    theirs, ours = models
    asked = ["Marie Curie works in Paris", " ", "Siemens AG in München", "x"]
    sets = [["person", "city"], ["a"], {"org": "company name", "place": "city"}, ["date"]]
    same(
        ours.inference(asked, sets, threshold=0.3),
        theirs.inference(asked, sets, threshold=0.3, batch_size=8),
    )
    sets[2] = []
    assert ours.inference(asked, sets, threshold=0.3)[2] == []
    same(
        ours.inference(asked, {"p": "person", "c": "city"}, threshold=0.3),
        theirs.inference(asked, {"p": "person", "c": "city"}, threshold=0.3),
    )


def test_class_probs_and_input_spans(models):
    theirs, ours = models
    asked = ["Marie Curie works in Paris", "Siemens AG in München on 2024-01-31"]
    spans = [[{"start": 0, "end": 11}, {"start": 1, "end": 5}], [{"start": 0, "end": 10}]]
    options = {"threshold": 0.01, "return_class_probs": True}
    found = ours.inference(asked, LABELS, **options)
    expected = theirs.inference(asked, LABELS, **options)
    same(found, expected)
    assert all(len(e["class_probs"]) == 5 for e in itertools.chain(*found)) and found[0]
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert list(a["class_probs"]) == list(b["class_probs"])
    same(
        ours.inference(asked, LABELS, threshold=0.01, input_spans=spans),
        theirs.inference(asked, LABELS, threshold=0.01, input_spans=spans),
    )
    same(
        [ours.predict_entities(asked[0], "person", threshold=0.1)],
        [theirs.predict_entities(asked[0], "person", threshold=0.1)],
    )


def test_budget_and_order_change_nothing(models):
    _, ours = models
    asked = decided(models[0], texts(seed=5), 40, LABELS)
    expected = ours.inference(asked, LABELS, threshold=0.5)
    same(ours.inference(asked, LABELS, threshold=0.5, token_budget=64), expected)
    same(ours.inference(asked[::-1], LABELS, threshold=0.5)[::-1], expected)


def test_batches_keep_to_the_budget_with_their_prompts(models, monkeypatch):
    _, ours = models
    sizes, candidates = [], type(ours).candidates

    def seeing(self, batch, *args, **given):
        sizes.append((batch.tokens.total_tokens, batch.num_seqs))
        return candidates(self, batch, *args, **given)

    monkeypatch.setattr(type(ours), "candidates", seeing)
    asked = [text for text in itertools.islice(texts(seed=4), 60) if text.strip()]
    ours.inference(asked, LABELS, token_budget=400)
    assert all(tokens <= 400 or count == 1 for tokens, count in sizes)
    assert sum(count for _, count in sizes) >= len(asked) > 2 * len(sizes)


def test_progress_is_shown_where_asked(models, capfd):
    _, ours = models
    for shown in (False, True):
        capfd.readouterr()
        ours.inference(["Marie Curie", "Paris"], LABELS, show_progress=shown)
        assert bool(capfd.readouterr().err) == shown


def test_blank_texts_and_one_very_long_word(models):
    theirs, ours = models
    assert ours.inference(["", "  ", "\n"], LABELS) == [[], [], []]
    assert ours.inference([], LABELS) == []
    word = ("person" * 1667)[:10_000]
    same(
        [ours.predict_entities(word, LABELS, threshold=0.1)],
        [theirs.predict_entities(word, LABELS, threshold=0.1)],
    )


BAD = [
    (("text", []), {}, ValueError, "at least one"),
    (("text", None), {}, TypeError, "labels"),
    (("text", ["a", 3]), {}, TypeError, "labels.*int"),
    (("text", ["a", " "]), {}, ValueError, "blank"),
    (("text", ["very " * 400]), {}, ValueError, "400 words"),
    (("text", {"a": "x", "b": "x"}), {}, ValueError, "same description"),
    ((["a", "b"], [["x"]]), {}, ValueError, "each of 2 texts"),
    ((["a", "b"], [["x"], "y"]), {}, TypeError, r"labels\[1\]"),
    ((3, ["a"]), {}, TypeError, "texts"),
    ((["a", None], ["a"]), {}, TypeError, "index 1"),
    ((b"a", ["a"]), {}, TypeError, "texts"),
    (("text", ["a"]), {"threshold": 1.5}, ValueError, "probability"),
    (("text", ["a"]), {"threshold": "0.5"}, TypeError, "threshold"),
    (("text", ["a"]), {"token_budget": 0}, ValueError, "token_budget"),
    (("text", ["a"]), {"labels_per_pass": 0}, ValueError, "labels_per_pass"),
    (("text", ["a"]), {"input_spans": []}, ValueError, "input_spans"),
    (("text", ["a"]), {"input_spans": [[(0, 1)]]}, TypeError, r"input_spans\[0\]"),
    (("text", ["a"]), {"labels_embeds": torch.zeros(1, 32)}, NotImplementedError, "bi-encoder"),
]


@pytest.mark.parametrize(("args", "options", "error", "words"), BAD, ids=lambda v: str(v)[:24])
def test_misuse(models, args, options, error, words):
    with pytest.raises(error, match=words):
        models[1].inference(*args, **options)


def test_duplicate_labels_are_asked_once(models):
    _, ours = models
    text = "Marie Curie works in Paris"
    expected = ours.predict_entities(text, ["person", "city"], threshold=0.2)
    assert ours.predict_entities(text, ["person", "city", "person"], threshold=0.2) == expected


def test_the_mode_of_the_model_is_given_back(models):
    _, ours = models
    ours.train()
    ours.predict_entities("x y", LABELS)
    assert ours.training and ours.token_rep_layer.training
    ours.eval()


def test_threads_that_leave_keep_evaluation_mode(models, monkeypatch):
    """A model in training mode, and a thread that ends within another's call."""
    model, text, entered, leave = models[1], "Marie Curie in Paris", Event(), Event()
    predict = _gliner_api.predict
    expected = model.inference([text], LABELS, threshold=0.1)

    def first(*args):
        entered.set()
        leave.wait(30)
        return predict(*args)

    def second(*args):
        leave.set()
        thread.join()
        return predict(*args)

    model.train()
    monkeypatch.setattr(_gliner_api, "predict", first)
    thread = Thread(target=model.inference, args=([text], LABELS))
    thread.start()
    entered.wait(30)
    monkeypatch.setattr(_gliner_api, "predict", second)
    same(model.inference([text], LABELS, threshold=0.1), expected)
    assert all(module.training for module in model.modules())
    model.eval()
