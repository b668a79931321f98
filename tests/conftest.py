"""Shared fixtures: a seed for each test and offline hubs."""

from __future__ import annotations

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
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


def seed_all():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# Fixtures of a module are made before those of its first test: what they draw must not depend on
# the test that this process ran before.
@pytest.fixture(autouse=True, scope="module")
def seed_of_module():
    seed_all()


@pytest.fixture(autouse=True)
def seed():
    seed_all()


@pytest.fixture
def two_threads():
    """The CPU kernels' work is split: `make test` gives each of its processes one thread. What a
    test sets lasts until its end."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
