"""Every registered method, and one from outside, through the same behaviours."""

from __future__ import annotations

import pytest

from mirageq.methods import METHODS
from mirageq.testing import METHOD_CHECKS, quick


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_method(name, check, tmp_path):
    check(quick(METHODS[name]), tmp_path)
