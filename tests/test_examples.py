"""The example of an outside method passes the same conformance checks as the methods inside."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from mirageq.testing import METHOD_CHECKS


@pytest.fixture(scope="module")
def own_method():
    path = Path(__file__).resolve().parents[1] / "examples" / "own_method.py"
    spec = importlib.util.spec_from_file_location("own_method", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_method"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_own_method(check, own_method, tmp_path):
    check(own_method.SmoothNoise(), tmp_path)
