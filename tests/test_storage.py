from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mirageq
from mirageq import Scheme, Teacher, UserError, cli, save_student
from mirageq.quant import convert
from mirageq.storage import load_student
from mirageq.testing import SHAPE, TinyResNet


@pytest.fixture(scope="module")
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE)


@pytest.fixture(scope="module")
def student(teacher):
    student = convert(teacher.network, Scheme(weight_bits=3, activation_bits=5, first_last_bits=8, placement="deploy"))
    student.calibrate([torch.randn(20, *SHAPE)])
    return student


def test_a_student_comes_back_bit_by_bit_with_its_scheme(teacher, student, tmp_path):
    save_student(student, teacher, tmp_path / "student.safetensors")
    again = mirageq.load(tmp_path / "student.safetensors", TinyResNet(), image_shape=SHAPE)
    assert again.scheme == student.scheme
    images = torch.randn(8, *SHAPE)
    assert torch.equal(again(images), student(images))


def test_a_run_is_loaded_by_its_folder_alone(tmp_path):
    network = ["py:mirageq.testing:TinyResNet", "--image-shape", "3,16,16", "--method", "noise"]
    short = [
        "--set",
        "images=8",
        "--set",
        "calibration_images=8",
        "--set",
        "tuner.steps=2",
        "--set",
        "tuner.batch_size=4",
    ]
    assert cli.main(["quantize", *network, *short, "--out", str(tmp_path / "run")]) == 0
    by_name = mirageq.load(tmp_path / "run")
    by_model = mirageq.load(tmp_path / "run", TinyResNet(), image_shape=SHAPE)
    images = torch.randn(4, *SHAPE)
    assert torch.equal(by_name(images), by_model(images))


def test_another_network_another_format_and_damage_are_said(teacher, student, tmp_path):
    path = tmp_path / "student.safetensors"
    save_student(student, teacher, path)
    other = TinyResNet()
    with torch.no_grad():
        other.linear.bias.add_(1)
    with pytest.raises(UserError, match="belongs to another network"):
        load_student(path, Teacher.wrap(other, SHAPE))
    tensors = load_file(path)
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="no mirageq header"):
        load_student(tmp_path / "bare.safetensors", teacher)
    save_file(tensors, tmp_path / "old.safetensors", {"mirageq": json.dumps({"format": 0})})
    with pytest.raises(UserError, match="written in format 0, this version reads format 1"):
        load_student(tmp_path / "old.safetensors", teacher)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="missing or damaged"):
        load_student(path, teacher)
    with pytest.raises(UserError, match="missing or damaged"):
        load_student(tmp_path / "none.safetensors", teacher)


def test_tensors_that_do_not_fit_the_scheme_are_said(teacher, student, tmp_path):
    path = tmp_path / "student.safetensors"
    state = save_student(student, teacher, path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    state.pop(next(iter(state)))
    save_file(state, path, header)
    with pytest.raises(UserError, match="does not fit its own scheme"):
        load_student(path, teacher)


def test_an_interruption_leaves_the_file_of_before(teacher, student, tmp_path, monkeypatch, half_written):
    path = tmp_path / "student.safetensors"
    save_student(student, teacher, path)
    before = path.read_bytes()
    monkeypatch.setattr("mirageq.storage.save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        save_student(student, teacher, path)
    assert path.read_bytes() == before


def test_what_is_missing_from_a_call_is_said(teacher, student, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        mirageq.load(tmp_path / "student.safetensors")
    with pytest.raises(UserError, match="Give image_shape"):
        mirageq.load(tmp_path, TinyResNet())
    with pytest.raises(UserError, match="cannot be written"):
        save_student(student, teacher, tmp_path / "none" / "student.safetensors")
