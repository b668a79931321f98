"""fastenc.train.gliner against gliner's own Trainer, and what it promises beside."""

from __future__ import annotations

import copy
import random
import warnings

import gliner_tests
import pytest
import torch
from model_tests import check_gradients, gradients_of

from fastenc.testing import assert_parity
from fastenc.train import GLiNERTrainer, GLiNERTrainingArguments

NAMES = ["Marie Curie", "Ada Lovelace", "Alan Turing", "Jo"]
CITIES = ["Paris", "São Paulo", "München", "Rome"]
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def examples(count: int, seed: int = 0, **keys) -> list[dict]:
    """Sentences of persons and cities, a few with neither."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        words, ner = ["So", "far"], []
        for kind, values in (("person", NAMES), ("city", CITIES)):
            if i % 5 != 4:
                value = draw.choice(values).split()
                ner.append([len(words), len(words) + len(value) - 1, kind])
                words += [*value, draw.choice(["works", "in", "sees"])]
        made.append({"tokenized_text": [*words, "."], "ner": ner, **keys})
    return made


def arguments(folder, **given) -> GLiNERTrainingArguments:
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "max_steps": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return GLiNERTrainingArguments(**{**common, **given})


def steady_model(backbone="bert", **config):
    """A model of gliner's without dropout."""
    encoder = {**STEADY, **config.pop("encoder", {})} if backbone != "modernbert" else {}
    theirs = gliner_tests.their_model(backbone, encoder=encoder, dropout=0.0, **config)
    for module in theirs.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if getattr(theirs.config, "labels_encoder_config", None) is not None:
        for name in STEADY:
            setattr(theirs.config.labels_encoder_config, name, 0.0)
    return theirs


def their_batch(theirs, rows):
    collator = theirs.data_collator_class(theirs.config, data_processor=theirs.data_processor,
                                          prepare_labels=True)  # fmt: skip
    return collator(rows)


LOSSES = {
    "plain": {},
    "focal": {"focal_loss_alpha": 0.75, "focal_loss_gamma": 2.0, "focal_loss_prob_margin": 0.05},
    "mean, smoothed": {"loss_reduction": "mean", "label_smoothing": 0.1},
    "alpha": {"focal_loss_alpha": 0.75, "focal_loss_gamma": 2.0},
}
# gliner's bi-encoder takes label_smoothing for prob_margin, and no prob_margin
COMBINATIONS = [
    *((head, loss) for head in ("span", "token") for loss in ("plain", "focal", "mean, smoothed")),
    ("bi-encoder", "plain"),
    ("bi-encoder", "alpha"),
]
HEADS = {
    "span": {"span_mode": "markerV0"},
    "token": {"span_mode": "token_level"},
    "bi-encoder": {"span_mode": "markerV0", "labels": "bert"},
}


@pytest.mark.parametrize(("head", "loss"), COMBINATIONS)
def test_gradients_are_gliners(head, loss, tmp_path):
    """At the head's real size, 512, over ragged texts with labels of their own."""
    theirs = steady_model(hidden_size=512, max_width=12, **HEADS[head])
    model = gliner_tests.ours(theirs, tmp_path / "model")
    rows = examples(7, seed=2)
    for i, row in enumerate(rows):
        row["ner_labels"] = ["city", "date", "person", "product"][: 2 + i % 3]
    if head == "bi-encoder":
        rows = [{**row, "ner_label": ["city", "date", "person"]} for row in rows]
    trainer = GLiNERTrainer(model, arguments(tmp_path, **LOSSES[loss]), rows)
    model.train()
    if head == "bi-encoder":
        rows = [{**row, "ner_labels": row["ner_label"]} for row in rows]
    names = {"focal_loss_alpha": "alpha", "focal_loss_gamma": "gamma",
             "focal_loss_prob_margin": "prob_margin", "loss_reduction": "reduction"}  # fmt: skip
    options = {names.get(k, k): v for k, v in LOSSES[loss].items()}

    def our_loss(rows):
        return trainer.compute_loss(model, {"batch": trainer.data_collator(rows)["batch"]})

    def loss_of(twin):
        def their_loss(rows):
            random.seed(0)
            batch = their_batch(theirs, rows)
            if twin is exact_model:
                batch["labels"] = batch["labels"].double()
            return twin.model(**batch, negatives=1.0, masking="global", **options).loss

        return their_loss

    def run(owner, loss_of_rows):
        """Losses of all rows and of each row alone, and the gradients of the first."""
        owner.train()
        whole = loss_of_rows(rows)
        whole.backward()
        grads = {n: p.grad for n, p in owner.named_parameters()}
        with torch.no_grad():
            return torch.stack([whole, *(loss_of_rows([row]) for row in rows)]), grads

    exact_model = copy.deepcopy(theirs)
    exact_model.model.double()
    losses, grads = run(model, our_loss)
    plain, plain_grads = run(theirs.model, loss_of(theirs))
    exact, exact_grads = run(exact_model.model, loss_of(exact_model))
    assert_parity("loss", losses, plain, exact)
    used = {n for n, g in exact_grads.items() if g is not None and g.abs().max() > 0}
    assert len(used) > 20
    check_gradients(*([{n: g[n] for n in used}] for g in (grads, plain_grads, exact_grads)))


def test_bce_is_gliners_cross_entropy_within_its_clamp():
    from gliner.modeling.loss_functions import focal_loss_with_logits

    from fastenc.train._gliner_loss import bce_loss, focal_loss

    logits = torch.linspace(-12, 12, 400, dtype=torch.float64)
    for targets in (torch.zeros_like(logits), torch.ones_like(logits)):
        expected = focal_loss_with_logits(logits, targets, alpha=-1, gamma=0, label_smoothing=0.1)
        torch.testing.assert_close(bce_loss(logits, targets, 0.1), expected)
        torch.testing.assert_close(focal_loss(logits, targets, label_smoothing=0.1), expected)
    far = torch.tensor([-40.0], requires_grad=True)
    bce_loss(far, torch.ones(1)).backward()
    assert far.grad == -1.0


@pytest.mark.parametrize("token_level", [False, True])
def test_masking_keeps_positives_and_a_share_of_the_negatives(token_level):
    """ "span" and "label" mask only what has no positive at all; gliner's masks, packed."""
    from fastenc.train._gliner_loss import negative_mask

    class_dim = 1 if token_level else 2
    targets = torch.zeros((60, 4, 3) if token_level else (60, 5, 4))
    places = [(3, 2, 0), (40, 1, 1)] if token_level else [(3, 0, 2), (40, 4, 1)]
    targets[tuple(zip(*places, strict=True))] = 1.0
    seqs = torch.arange(60) // 30
    args = (class_dim, seqs, 2)
    assert negative_mask(targets, *args, "none", 0.0) is None
    assert negative_mask(targets, *args, "global", 1.0) is None
    kept = {m: negative_mask(targets, *args, m, 0.0) for m in ("global", "label", "span")}
    assert torch.equal(kept["global"], targets == 1)
    for word, *_ in places:
        seq = slice(word // 30 * 30, word // 30 * 30 + 30)
        label = 2 if word == 3 else 1
        labels = kept["label"][seq].amax((0, 2) if token_level else (0, 1))
        assert labels.tolist() == [c == label for c in range(4)]
        assert kept["label"][seq].select(class_dim, label).all()
    rows = kept["span"].flatten(1) if token_level else kept["span"].flatten(0, 1)
    assert rows.all(1).sum() == 2 and rows.any(1).sum() == 2
    half = negative_mask(targets, *args, "global", 0.5).float().mean()
    assert 0.35 < half < 0.65


# ---- memory --------------------------------------------------------------------------------------


class Short(torch.autograd.Function):
    """A backward that is out of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_splits_the_batch_and_says_so(where, reduction, tmp_path, caplog):
    model = gliner_tests.ours(steady_model(), tmp_path / "model")
    args = arguments(tmp_path, loss_reduction=reduction, per_device_train_batch_size=8)
    rows = examples(8, ner_labels=["city", "person"])
    trainer = GLiNERTrainer(model, args, rows)
    batch = trainer.data_collator(rows)
    trainer.create_optimizer()

    def step():
        model.zero_grad(set_to_none=True)
        trainer.current_gradient_accumulation_steps = 1
        loss = sum(trainer.training_step(model, batch) for _ in range(2))  # two accumulate
        return loss, gradients_of(model)

    expected, gradients = step()
    whole, sizes = type(model).logits, []

    def short(self, data, *args):
        sizes.append(data.num_seqs)
        if data.num_seqs > 2 and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        found = whole(self, data, *args)
        return Short.apply(found) if data.num_seqs > 2 else found

    model.forward = short.__get__(model)
    with caplog.at_level("WARNING", "fastenc"):
        loss, split = step()
    assert sizes == [8, 4, 2, 2, 4, 2, 2] * 2
    assert "out of memory on a batch of 8 texts" in caplog.text and "in halves" in caplog.text
    torch.testing.assert_close(loss, expected)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        allowed = 1e-4 * float(gradient.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(split[name], gradient, atol=allowed, rtol=0, msg=name)


def test_one_example_that_does_not_fit_is_an_error(tmp_path, caplog):
    model = gliner_tests.ours(steady_model(), tmp_path / "model")
    trainer = GLiNERTrainer(model, arguments(tmp_path), examples(2))

    def never(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = never
    with pytest.raises(torch.OutOfMemoryError), caplog.at_level("WARNING", "fastenc"):
        trainer.train()
    assert "cannot be split" in caplog.text


# ---- runs ----------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_run(tmp_path):
    """Sampled types, dropout and all: the weights after six steps are the same."""
    theirs = gliner_tests.their_model("bert", encoder=STEADY)
    folder = tmp_path / "model"
    options = {"max_steps": 6, "max_neg_type_ratio": 2, "learning_rate": 1e-3}
    rows = examples(20)
    torch.manual_seed(0)
    whole = gliner_tests.ours(theirs, folder)
    GLiNERTrainer(whole, arguments(tmp_path / "a", **options), rows).train()
    broken = gliner_tests.ours(theirs, folder)
    first = arguments(tmp_path / "b", **options, save_strategy="steps", save_steps=3)
    trainer = GLiNERTrainer(broken, first, rows)
    trainer.train()
    resumed = gliner_tests.ours(theirs, folder)
    again = GLiNERTrainer(resumed, first, rows)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for (name, a), b, c in zip(
        whole.named_parameters(), broken.parameters(), resumed.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)
        torch.testing.assert_close(a, c, msg=name)


def test_two_learning_rates_and_no_decay_of_biases_and_norms(tmp_path):
    model = gliner_tests.ours(steady_model(), tmp_path / "model")
    args = arguments(tmp_path, learning_rate=1e-5, others_lr=1e-3, weight_decay=0.1,
                     others_weight_decay=0.2)  # fmt: skip
    optimizer = GLiNERTrainer(model, args, examples(2)).create_optimizer()
    named = {p: n for n, p in model.named_parameters()}
    seen = {
        named[p]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups for p in group["params"]
    }  # fmt: skip
    assert len(seen) == len(named)
    for name, found in seen.items():
        encoder, plain = "token_rep_layer" in name, "bias" in name or "LayerNorm" in name
        rate, decay = (1e-5, 0.1) if encoder else (1e-3, 0.2)
        assert found == (rate, 0.0 if plain else decay), name


# ---- whole runs ----------------------------------------------------------------------------------


def rates(history) -> list[float]:
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.parametrize(("head", "backbone"), [("span", "deberta-v2"), ("token", "bert")])
def test_thirty_steps_are_gliners(head, backbone, tmp_path):
    """The same batches, two learning rates, weight decay, clipping: the same loss at each step."""
    from gliner.training import Trainer, TrainingArguments

    theirs = steady_model(backbone, **HEADS[head])
    model = gliner_tests.ours(theirs, tmp_path / "model")
    rows = examples(40, seed=1, ner_labels=["city", "person", "date"])
    shared = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "max_steps": 30, "learning_rate": 5e-4, "others_lr": 2e-3, "weight_decay": 0.01,
        "others_weight_decay": 0.02, "focal_loss_alpha": 0.75, "focal_loss_gamma": 1.0,
        "warmup_steps": 3, "lr_scheduler_type": "linear", "loss_reduction": "mean", "seed": 5,
        "gradient_accumulation_steps": 1, "remove_unused_columns": False,
    }  # fmt: skip
    trainer = GLiNERTrainer(model, GLiNERTrainingArguments(**shared), rows)
    trainer.train()
    collator = theirs.data_collator_class(theirs.config, data_processor=theirs.data_processor,
                                          prepare_labels=True)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = Trainer(
            model=theirs, args=TrainingArguments(**shared), train_dataset=rows,
            data_collator=collator,
        )  # fmt: skip
        twin.train()
    ours, gliners = (torch.tensor(rates(t.state.log_history)) for t in (trainer, twin))
    assert len(ours) == len(gliners) == 30
    assert ours[-5:].mean() < 0.7 * ours[:5].mean()
    torch.testing.assert_close(ours, gliners, rtol=2e-3, atol=2e-4)
