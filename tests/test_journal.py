from __future__ import annotations

import io

import pytest
from rich.console import Console

from mirageq.errors import UserError
from mirageq.journal import Journal, read_history


def test_history_is_written_row_by_row_and_read_back(tmp_path):
    journal = Journal(tmp_path)
    with journal.stage("tune", 2) as advance:
        advance(0, loss=2.0)
        assert read_history(tmp_path / "history.jsonl") == [{"stage": "tune", "step": 0, "loss": 2.0}]
        advance(1, loss=1.0)
    assert Journal(tmp_path).history == journal.history


def test_rows_past_the_resumed_step_are_dropped(tmp_path):
    journal = Journal(tmp_path)
    with journal.stage("tune", 5) as advance:
        for step in range(4):
            advance(step, loss=float(step))
    journal = Journal(tmp_path)
    with journal.stage("tune", 5, start=2) as advance:
        advance(2, loss=20.0)
    assert [(row["step"], row["loss"]) for row in read_history(tmp_path / "history.jsonl")] == [(0, 0), (1, 1), (2, 20)]


def test_a_line_cut_short_is_left_out(tmp_path):
    file = tmp_path / "history.jsonl"
    file.write_text('{"stage": "tune", "step": 0, "loss": 1.0}\n{"stage": "tu')
    assert len(read_history(file)) == 1


@pytest.mark.parametrize("cut", ['{"stage": "tu', '{"stage": "tune", "step": 1}'], ids=["in the row", "before its end"])
def test_a_history_whose_last_line_was_cut_short_is_mended(tmp_path, cut):
    file = tmp_path / "history.jsonl"
    file.write_text('{"stage": "tune", "step": 0, "loss": 1.0}\n' + cut)
    journal = Journal(tmp_path)
    journal.say("on it goes")
    assert read_history(file) == journal.history
    assert journal.history[-1]["text"] == "on it goes"


def test_seconds_add_up_over_interrupted_and_killed_calls(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0, 13.5, 20.0, 21.0, 30.0])
    monkeypatch.setattr("mirageq.journal.time.perf_counter", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path).timed("tune"):  # 0 to 2
        raise KeyboardInterrupt
    killed = Journal(tmp_path)
    alive = killed.timed("tune")
    alive.__enter__()  # from 10 on, never left
    killed.checkpoint("tune").save({})  # at 13
    killed.checkpoint("tune").save({})  # at 13.5
    journal = Journal(tmp_path)
    with journal.timed("calibrate"):  # 20 to 21
        pass
    assert journal.seconds == {"tune": 5.5, "calibrate": 1.0}


def test_seconds_of_what_was_finished_are_not_counted_again(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("mirageq.journal.time.perf_counter", lambda: next(clock))
    with Journal(tmp_path).timed("synthesize"):  # 0 to 2
        pass
    journal = Journal(tmp_path)
    with journal.timed("synthesize"):
        pass
    with journal.timed("tune"):  # 10 to 13
        pass
    assert journal.seconds == {"synthesize": 2.0, "tune": 3.0}


def test_seconds_count_up_to_the_last_checkpoint_of_a_part(tmp_path, monkeypatch):
    clock = iter([0.0, 7.0, 9.0])
    monkeypatch.setattr("mirageq.journal.time.perf_counter", lambda: next(clock))
    killed = Journal(tmp_path)
    alive = killed.timed("synthesize")
    alive.__enter__()  # never left
    killed.within("first").checkpoint("paint").save({})  # at 7
    assert Journal(tmp_path).seconds == {"synthesize": 7.0}


def test_checkpoints_wait_for_their_time_and_vanish_when_cleared(tmp_path):
    patient, eager = Journal(tmp_path).checkpoint("a"), Journal(tmp_path, checkpoint_seconds=0).checkpoint("b")
    patient.offer(lambda: {"step": 1})
    eager.offer(lambda: {"step": 1})
    assert patient.load() is None
    assert eager.load() == {"step": 1}
    eager.clear()
    assert eager.load() is None
    Journal(checkpoint_seconds=0).checkpoint("c").offer(lambda: {"step": 1})


def test_the_console_shows_the_stage_its_terms_and_the_time_left():
    screen = io.StringIO()
    journal = Journal(console=Console(file=screen, force_terminal=True, width=120))
    with journal.stage("tune", 3) as advance:
        for step in range(3):
            advance(step, kd=0.5)
    journal.say("a note with [brackets]")
    text = screen.getvalue()
    assert "tune" in text
    assert "3/3" in text
    assert "kd 0.5" in text
    assert "left" in text
    assert "a note with [brackets]" in text


def test_a_damaged_checkpoint_is_told(tmp_path):
    checkpoint = Journal(tmp_path).checkpoint("paint")
    checkpoint.save({"step": 3})
    path = tmp_path / "checkpoints" / "paint.pt"
    for content in (b"", b"junk", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"paint.pt is damaged; without it, its part is computed anew"):
            checkpoint.load()
