"""Shared fixtures: a seed for each test and offline hubs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Some names of tests hold numbers that are drawn as they are collected: the same in every process.
torch.manual_seed(0)


def pytest_sessionstart(session):
    if os.environ.get("FASTENC_SANITIZE") == "1":  # make sanitize
        from fastenc import _C

        assert "/build/sanitize/" in _C.__file__, f"{_C.__file__} is not the sanitized library"


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
