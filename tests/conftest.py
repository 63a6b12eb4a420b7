"""Shared fixtures: third-party inputs, and a hypothesis profile that suits slow first calls."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fcunet", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fcunet")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of third-party inputs, named by FCUNET_TEST_DATA; skips without it."""
    folder = os.environ.get("FCUNET_TEST_DATA")
    if not folder:
        pytest.skip("FCUNET_TEST_DATA is not set: third-party inputs are not at hand")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"FCUNET_TEST_DATA names {path}, which is not a folder")
    return path
