from __future__ import annotations

import os
import threading

import pytest

from mirageq.errors import UserError
from mirageq.folders import alone, replacing


def test_two_processes_may_replace_a_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "shared.json"
    with replacing(path) as first:
        first.write_text("ours")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with replacing(path) as second:
            second.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_one_may_wait_until_a_folder_is_free(tmp_path):
    order = []

    def second():
        with alone(tmp_path / "lock", lambda: order.append("waiting")):
            order.append("second")

    waiting = threading.Thread(target=second)
    (tmp_path / "lock").touch()
    with alone(tmp_path / "lock"):
        waiting.start()
        waiting.join(0.3)
        with pytest.raises(UserError, match="Another process is at work"), alone(tmp_path / "lock"):
            pass
        order.append("first")
    waiting.join()
    assert order == ["waiting", "first", "second"]


def test_what_is_interrupted_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), replacing(path) as written:
        (written.write_text("half"), written.write_text(3))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
