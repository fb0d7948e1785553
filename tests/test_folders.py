from __future__ import annotations

import os

from mirageq.folders import replacing


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
