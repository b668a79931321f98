"""GLiNER training data: the types of an example, and what is wrong with bad data."""

from __future__ import annotations

import copy
import random

import gliner_tests
import pytest
import torch
from test_train_gliner import arguments, steady_model

from fastenc.train import GLiNERTrainer

# ---- types ---------------------------------------------------------------------------------------


def sampled(rows, shared=False, **given):
    from fastenc.train._gliner_data import TypeSampling, check_example

    given = {"max_types": 25, "max_neg_type_ratio": 0, **given}
    examples = [check_example(row) for row in rows]
    return [e.types for e in TypeSampling(**given).sample(examples, shared, random)]


def test_types_of_an_example():
    random.seed(0)
    rows = [
        {"tokenized_text": ["a", "b"], "ner": [[0, 0, "x"], [1, 1, "y"], [0, 1, "x"]]},
        {"tokenized_text": ["a"], "ner": [[0, 0, "z"]]},
        {"tokenized_text": ["a"], "ner": []},
        {"tokenized_text": ["a"], "ner": [], "ner_negatives": ["u", "v"]},
        {"tokenized_text": ["a"], "ner": [[0, 0, "z"]], "ner_labels": ["k", "z"]},
    ]
    for _ in range(20):
        first, second, *rest = sampled(rows)
        assert set(first) == {"x", "y"} and second == ("z",)
        assert rest[0] == ("",) and set(rest[1]) == {"u", "v"} and rest[2] == ("k", "z")
    seen = [sampled(rows, max_neg_type_ratio=1) for _ in range(60)]
    assert {frozenset(s[1]) for s in seen} == {frozenset("z"), frozenset("xz"), frozenset("yz")}
    assert {len(s[0]) for s in seen} == {2, 3}
    assert {s[0] for s in map(sampled, [rows] * 30)} == {("x", "y"), ("y", "x")}
    assert {s[0] for s in (sampled(rows, shuffle_types=False) for _ in range(9))} == {("x", "y")}
    dropped = {len(sampled(rows, random_drop=True)[0]) for _ in range(30)}
    assert dropped == {1, 2}
    assert {len(sampled(rows, max_types=1, max_neg_type_ratio=3)[0]) for _ in range(9)} == {1}
    union = sampled(rows[:4], shared=True)
    assert len({*union}) == 1 and set(union[0]) == {"x", "y", "z", "u", "v"}


# ---- bad input -----------------------------------------------------------------------------------

GOOD = {"tokenized_text": ["a", "b", "c"], "ner": [[0, 1, "x"]]}
BAD = [
    ("text", TypeError, r"train_dataset\[1\]: expected a dictionary, got str"),
    ({"text": "a"}, ValueError, r"train_dataset\[1\]: expected the key 'tokenized_text'"),
    ({"tokenized_text": ["a"]}, ValueError, "expected the key 'ner'"),
    ({**GOOD, "tokenized_text": "a b c"}, TypeError, "tokenized_text: expected a list of strings"),
    ({**GOOD, "tokenized_text": ["a", 1, "c"]}, TypeError, "tokenized_text: expected a list"),
    ({**GOOD, "ner": "x"}, TypeError, "ner: expected a list of entities"),
    ({**GOOD, "ner": [[0, 1]]}, TypeError, r"ner\[0\]: expected \[first word, last word, type\]"),
    ({**GOOD, "ner": [[0, 1.0, "x"]]}, TypeError, "integers"),
    ({**GOOD, "ner": [[False, 1, "x"]]}, TypeError, "integers"),
    ({**GOOD, "ner": [[0, 1, " "]]}, TypeError, "a type's name"),
    ({**GOOD, "ner": [[0, 1, "x"], [2, 3, "x"]]}, ValueError, r"ner\[1\]: expected 0 <= first"),
    ({**GOOD, "ner": [[2, 1, "x"]]}, ValueError, "got 2 to 1"),
    ({**GOOD, "ner": [[-1, 1, "x"]]}, ValueError, "got -1 to 1"),
    ({**GOOD, "ner_labels": "x"}, TypeError, "ner_labels: expected a list of names"),
    ({**GOOD, "ner_labels": ["x", "x"]}, ValueError, "ner_labels: expected each name once"),
    ({**GOOD, "ner_negatives": [3]}, TypeError, "ner_negatives"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return gliner_tests.ours(steady_model(), tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(("bad", "error", "words"), BAD, ids=[words[:24] for *_, words in BAD])
def test_bad_data(small, tmp_path, bad, error, words):
    with pytest.raises(error, match=words):
        GLiNERTrainer(small, arguments(tmp_path), [GOOD, bad])


def test_misuse(small, tmp_path):
    with pytest.raises(TypeError, match=r"fastenc\.GLiNER, got Linear"):
        GLiNERTrainer(torch.nn.Linear(2, 2), arguments(tmp_path), [GOOD])
    with pytest.raises(TypeError, match="got a string"):
        GLiNERTrainer(small, arguments(tmp_path), "train.json")
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        GLiNERTrainer(small, arguments(tmp_path), [GOOD]).evaluate()
    for given in (
        {"masking": "all"}, {"loss_type": "dice"}, {"loss_reduction": "max"}, {"negatives": 1.5},
        {"max_types": 0}, {"remove_unused_columns": True},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(given))):
            arguments(tmp_path, **given)


def test_what_cannot_be_learned_is_said_once(small, tmp_path, caplog):
    long = {"tokenized_text": ["w"] * 400, "ner": [[0, 9, "x"], [390, 391, "x"]]}
    trainer = GLiNERTrainer(small, arguments(tmp_path), [long, GOOD])
    with caplog.at_level("WARNING", "fastenc"):
        for _ in range(2):
            batch = trainer.data_collator([long, GOOD])["batch"]
    assert caplog.text.count("longer than max_len = 384") == 1
    assert caplog.text.count("more than max_width = 5 words") == 1
    assert batch.batch.word_lengths == [384, 3] and len(batch.positives) == 1


def test_texts_without_words_or_entities_train(small, tmp_path):
    rows = [{"tokenized_text": [], "ner": []}, {"tokenized_text": ["a"], "ner": None}, GOOD]
    trainer = GLiNERTrainer(copy.deepcopy(small), arguments(tmp_path, max_steps=1), rows)
    assert trainer.train().training_loss > 0


def test_types_are_drawn_anew_each_epoch_and_the_same_again(small, tmp_path):
    """Of seed, epoch and texts alone: no other draw moves them."""
    rows = [{"tokenized_text": ["a", str(i)], "ner": [[0, 0, f"t{i}"]]} for i in range(8)]

    def drawn(epoch, seed=3):
        args = arguments(tmp_path, seed=seed, max_neg_type_ratio=3)
        collator = GLiNERTrainer(small, args, rows).data_collator
        collator.epoch = epoch
        random.random()
        return [e.types for e in collator(rows)["batch"].examples]

    assert drawn(0) == drawn(0) and len({str(drawn(i)) for i in range(4)}) == 4
    assert drawn(0) != drawn(0, seed=4)
