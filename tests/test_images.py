from __future__ import annotations

from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirageq.errors import UserError
from mirageq.images import GrowingSet, SyntheticSet

SHAPE = (3, 4, 5)


def images(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def shown(source, count):
    """The labels of the first so many batches."""
    return [batch.labels.tolist() for batch in islice(source.batches(4), count)]


def test_a_growing_file_is_readable_by_safetensors_and_keeps_what_was_written(tmp_path):
    path = tmp_path / "set.safetensors"
    growing = GrowingSet(7, SHAPE, path)
    growing.write(0, images(4), torch.arange(4))
    assert growing.finished == 4
    assert not path.exists(), "the final name appears only when the set is complete"
    growing.write(4, images(3, seed=1), torch.arange(3))
    finished = growing.finish(seed=0)
    stored = load_file(path)
    assert torch.equal(stored["images"], torch.cat([images(4), images(3, seed=1)]).half())
    assert stored["labels"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert torch.equal(finished.sample(7).images, stored["images"].float())


def test_a_growing_file_goes_on_where_it_was(tmp_path):
    path = tmp_path / "set.safetensors"
    GrowingSet(6, SHAPE, path).write(0, images(4), torch.zeros(4, dtype=torch.int64))
    again = GrowingSet(6, SHAPE, path)
    assert again.finished == 4
    assert torch.equal(again.read(0, 4).images, images(4).half().float())


def test_a_finished_file_counts_as_fully_painted(tmp_path):
    path = tmp_path / "set.safetensors"
    growing = GrowingSet(2, SHAPE, path)
    growing.write(0, images(2), torch.zeros(2, dtype=torch.int64))
    growing.finish(seed=0)
    readers = [GrowingSet(2, SHAPE, path) for _ in range(2)]  # as cells of a comparison that are computed at a time
    assert [reader.finished for reader in readers] == [2, 2]
    for reader in readers:
        assert torch.equal(reader.finish(seed=0).sample(2).images, images(2).half().float())


def test_memory_and_file_give_the_same_bits(tmp_path):
    sets = []
    for path in (None, tmp_path / "set.safetensors"):
        growing = GrowingSet(3, SHAPE, path)
        growing.write(0, images(3), torch.arange(3))
        sets.append(growing.finish(seed=0).digest())
    assert sets[0] == sets[1]


def test_a_begun_file_of_another_size_is_refused(tmp_path):
    GrowingSet(6, SHAPE, tmp_path / "set.safetensors").write(0, images(2), torch.arange(2))
    with pytest.raises(UserError, match="begun with another image count or shape"):
        GrowingSet(8, SHAPE, tmp_path / "set.safetensors")


def test_every_epoch_shows_each_image_once_in_another_order():
    source = SyntheticSet(images(8), torch.arange(8), seed=3)
    labels = shown(source, 4)
    first, second = labels[0] + labels[1], labels[2] + labels[3]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_batches_begin_at_the_first_epoch_and_go_on_from_a_loaded_state_once():
    source, other = (SyntheticSet(images(8), torch.arange(8), seed=3) for _ in range(2))
    whole = shown(source, 5)
    assert shown(source, 5) == whole
    shown(other, 3)
    state = other.state_dict()
    source.load_state_dict(state)
    assert source.state_dict() == state
    assert shown(source, 2) == whole[3:]
    assert shown(source, 2) == whole[:2]


def test_an_interruption_leaves_the_file_of_before(tmp_path, monkeypatch, half_written):
    path = tmp_path / "set.safetensors"
    SyntheticSet(images(2), torch.arange(2)).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("mirageq.images.save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        SyntheticSet(images(3), torch.arange(3)).save(path)
    assert path.read_bytes() == before


def test_as_many_labels_as_images_are_needed():
    with pytest.raises(UserError, match="as many labels as images, and at least one; got 7 and 8"):
        SyntheticSet(images(8), torch.arange(7))


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(UserError, match="batch size 16 is larger than the set of 8"):
        next(SyntheticSet(images(8), torch.arange(8)).batches(16))


@pytest.mark.parametrize("content", [b"", b"not a set", None])
def test_a_damaged_or_missing_file_is_named(tmp_path, content):
    path = tmp_path / "set.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable file of synthetic images"):
        SyntheticSet.load(path)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "set.safetensors"
    save_file({"images": images(8), "labels": torch.arange(8)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable file"):
        SyntheticSet.load(path)


def test_an_unfinished_set_is_refused(tmp_path):
    path = tmp_path / "set.safetensors"
    save_file({"images": images(2), "labels": torch.tensor([0, -1])}, path)
    with pytest.raises(UserError, match="1 unfinished images; resume"):
        SyntheticSet.load(path)


def test_labels_and_images_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "images.safetensors"
    images = torch.zeros(2, 3, 4, 4)
    for labels in (torch.zeros(2, 1, dtype=torch.long), torch.zeros(2)):
        save_file({"images": images, "labels": labels}, path)
        with pytest.raises(UserError, match=r"is no file of synthetic images: they are \(N, C, H, W\) numbers"):
            SyntheticSet.load(path)
    save_file({"images": images.byte(), "labels": torch.zeros(2, dtype=torch.int32)}, path)
    with pytest.raises(UserError, match="is no file of synthetic images"):
        SyntheticSet.load(path)
    save_file({"images": images, "labels": torch.zeros(2, dtype=torch.int32)}, path)
    assert SyntheticSet.load(path).sample(2).labels.dtype == torch.int64


def test_a_set_with_a_gap_keeps_its_unfinished_name(tmp_path):
    path = tmp_path / "images.safetensors"
    growing = GrowingSet(4, (3, 2, 2), path)
    growing.write(0, torch.zeros(2, 3, 2, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match="holds 2 unfinished images; begin its run anew"):
        growing.finish(0)
    assert not path.exists()
