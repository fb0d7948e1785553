"""The commands as a user types them, on a small real file, in process."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.export import Dim, export

from mirageq import Distill, Teacher, UserError, ZeroQ, cli
from mirageq.folders import alone
from mirageq.models import NetworkChoice, load_teacher
from mirageq.recipe import SECTIONS, Recipe
from mirageq.run import Run, peak_memory
from mirageq.testing import SHAPE, TinyResNet

TINY = ["py:mirageq.testing:TinyResNet", "--image-shape", ",".join(map(str, SHAPE)), "--device", "cpu"]
QUICK = [
    *("--set", "images=16", "--set", "calibration_images=16", "--set", "method.iterations=4"),
    *("--set", "method.batch_size=8", "--set", "tuner.steps=6", "--set", "tuner.batch_size=8"),
]


MINE = """
from __future__ import annotations

from dataclasses import dataclass
from mirageq import Noise

@dataclass(frozen=True, kw_only=True)
class Mine(Noise):
    '''Noise under another name.'''
"""


def quantize(out, *more):
    return cli.main(["quantize", *TINY, *QUICK, "--method", "intraq", "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert quantize(out, "--bits", "w3a5", "--seed", "4") == 0
    return out


def test_quantize_writes_a_whole_run(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["seed"] == 4
    assert record["recipe"]["scheme"]["weight_bits"] == 3
    assert record["recipe"]["scheme"]["activation_bits"] == 5
    assert record["recipe"]["method"]["iterations"] == 4
    assert set(record["versions"]) - {"commit"} == {"mirageq", "torch", "python"}  # a wheel has no commit
    assert set(record["seconds"]) == {"convert", "synthesize", "calibrate", "tune"}
    assert len(record["network"]["sha256"]) == len(record["images"]["sha256"]) == len(record["student"]["sha256"]) == 64
    assert load_file(finished / "synthetic.safetensors")["images"].shape == (16, *SHAPE)
    rows = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "tune"] == list(range(6))
    assert sorted(path.name for path in finished.iterdir()) == [
        "history.jsonl",
        "run.json",
        "student.safetensors",
        "synthetic.safetensors",
    ]


def test_the_stored_student_answers_as_the_tuned_one_did(tmp_path):
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    choice = NetworkChoice(name="py:mirageq.testing:TinyResNet", image_shape=SHAPE)
    recipe = Recipe(method=ZeroQ(iterations=2), tuner=Distill(steps=3, batch_size=4), images=8, calibration_images=8)
    run = Run.create(tmp_path / "run", choice, recipe, 0, teacher)
    tuned = run.execute(teacher).student
    images = run.images().sample(8).images
    stored = Run.open(tmp_path / "run").student(load_teacher(choice))
    assert torch.equal(stored(images), tuned(images))
    assert not torch.equal(stored(images), teacher(images))


@pytest.mark.parametrize(
    ("made", "pictured"),
    [
        (["--method", "intraq", *QUICK], ["synthesis, one line a batch", "tuning"]),
        (["--recipe", "squant"], []),
        (
            ["--method", "union", "--set", "images=8", "--set", "method.first.iterations=2", "--set", "tuner.steps=0"]
            + ["--set", "method.second.iterations=2"],
            ["first: synthesis, one line a batch", "second: synthesis, one line a batch"],
        ),
    ],
    ids=["intraq", "squant", "union"],
)
def test_show_draws_what_a_run_made(made, pictured, tmp_path, monkeypatch, capsys):
    from mirageq import report

    assert cli.main(["quantize", *TINY, *made, "--out", str(tmp_path / "run")]) == 0
    titles, draw = [], report._draw
    monkeypatch.setattr(report, "_draw", lambda axis, title, stages: (titles.append(title), draw(axis, title, stages)))
    capsys.readouterr()
    assert cli.main(["show", str(tmp_path / "run")]) == 0
    assert titles == pictured
    printed = capsys.readouterr().out
    for name in ("images.png", "curves.png"):
        picture = matplotlib.image.imread(tmp_path / "run" / name)
        assert min(picture.shape[:2]) > 100
        assert np.ptp(picture) > 0, "something is drawn"
        assert name in printed


def test_the_images_of_a_run_serve_another_bit_width(finished, tmp_path):
    arguments = ["quantize", *TINY, "--images", str(finished), "--bits", "w8a8", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--set", "images=16", "--set", "tuner.steps=0"]) == 0
    ours, theirs = (load_file(folder / "synthetic.safetensors")["images"] for folder in (finished, tmp_path / "run"))
    assert torch.equal(ours, theirs)


def test_an_exported_file_is_quantized_and_evaluated(tmp_path, capsys):
    net = tmp_path / "net.pt2"
    torch.export.save(export(TinyResNet(), (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: Dim("n")},)), net)
    out = tmp_path / "run"
    assert cli.main(["quantize", str(net), *QUICK, "--method", "zeroq", "--bits", "w8a8", "--out", str(out)]) == 0
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(20) % 5)
    capsys.readouterr()
    evaluate = ["evaluate", str(out), "--data", str(tmp_path / "test.npz")]
    assert cli.main(evaluate) == 2
    assert "give --mean and --std" in capsys.readouterr().err
    assert cli.main([*evaluate, "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]) == 0
    printed = capsys.readouterr().out
    assert "full precision: " in printed
    assert "w8a8 zeroq: " in printed
    assert "20 images" in printed


def test_synthesize_makes_images_only(tmp_path, capsys):
    out = tmp_path / "images"
    arguments = ["synthesize", *TINY, "--method", "zeroq", "--count", "6", "--out", str(out)]
    assert cli.main([*arguments, "--set", "method.iterations=3", "--set", "method.batch_size=4"]) == 0
    assert "6 images" in capsys.readouterr().out
    assert load_file(out / "synthetic.safetensors")["images"].shape == (6, *SHAPE)
    assert not (out / "student.safetensors").exists()


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    from mirageq import journal

    assert quantize(tmp_path / "whole") == 0
    append, count = journal.Journal._append, [0]

    def stumble(self, row):
        append(self, row)
        count[0] += 1
        if count[0] in (5, 11):
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "_append", stumble)
    out = tmp_path / "broken"
    assert quantize(out) == 130
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert cli.main(["quantize", "--resume", str(out)]) == 130
    assert cli.main(["quantize", "--resume", str(out)]) == 0
    for name in ("student.safetensors", "synthetic.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from mirageq import journal

    def stumble(self, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "_append", stumble)
    assert quantize(tmp_path / "run") == 130
    assert f"Continue with: mirageq quantize --resume {tmp_path / 'run'}" in capsys.readouterr().err


def test_ctrl_c_in_a_real_process_continues_to_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "mirageq", "quantize", *TINY, "--method", "intraq", *QUICK]
    command += ["--set", "method.iterations=400"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    out = tmp_path / "broken"
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell hands it down ignored
    )
    history = out / "history.jsonl"
    while process.poll() is None and (not history.exists() or len(history.read_text().splitlines()) < 50):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "interrupted. Continue with: mirageq quantize --resume" in process.communicate()[1]
    assert process.returncode == 130
    resume = [sys.executable, "-m", "mirageq", "quantize", "--resume", str(out), "--device", "cpu"]
    subprocess.run(resume, check=True, capture_output=True)
    for name in ("student.safetensors", "synthetic.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


class Nan(TinyResNet):
    def __init__(self):
        super().__init__()
        self.linear.weight.data[0, 0] = float("nan")


class Normless(TinyResNet):
    def __init__(self):
        super().__init__(norms=False)


class TwoChannels(TinyResNet):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(2, *self.conv1.weight.shape[:1], 3, padding=1, bias=False)


HERE = f"py:{__file__}"
SHAPED = ["--image-shape", "3,16,16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense:net"], "nonsense:net"),
        (["py:mirageq.testing:TinyResNte", *SHAPED], "TinyResNte"),
        ([f"{HERE}:Nan", *SHAPED], "NaN or infinite"),
        ([f"{HERE}:Normless", *SHAPED], "no BatchNorm layer"),
        (["py:mirageq.testing:TinyResNet", "--image-shape", "1,16,16"], "does not accept images of shape"),
        (["py:mirageq.testing:TinyResNet"], "image shape"),
        ([*TINY, "--method", "itnraq"], "did you mean 'intraq'"),
        ([*TINY, "--set", "method.iteratoins=3"], "did you mean 'iterations'"),
        ([*TINY, "--set", "tuner.lr=fast"], "'lr' expects float; got 'fast'"),
        ([*TINY, "--bits", "w9a4"], "weight bits must be a whole number from 2 to 8; got 9"),
        ([*TINY, "--bits", ""], "w4a4"),
        ([*TINY, "--mean", "0.5,0.5,nan", "--std", "1,1,1"], "mean must be finite"),
        ([*TINY, "--recipe", "best-cifar10"], "give its mean and std"),
        ([*TINY, "--mean", "123,116,103", "--std", "58,57,57"], "Divide mean and std of bytes by 255"),
        ([*TINY, "--set", "images=8", "--set", "tuner.batch_size=16"], "batch size 16 is larger than the set of 8"),
        ([*TINY, "--set", "tuner.name=reconstruct"], "Set scheme.weight_range to mse or percentile"),
        ([*TINY[:-1], "gpu"], "There is no device 'gpu'"),
        ([*TINY[:-1], "meta"], "There is no device 'meta'"),
        ([*TINY[:-1], "cpu:"], "There is no device 'cpu:'"),
        (["nowhere.pt2"], "There is no file nowhere.pt2."),
        ([*TINY, "--bits", "int4"], "int4"),
        ([*TINY, "--recipe", "intraq-cifar"], "did you mean 'intraq-cifar10"),
        ([*TINY, "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        *([] if torch.cuda.is_available() else [([*TINY[:-1], "cuda"], "no CUDA device")]),
    ],
)
def test_bad_input_gets_a_sentence_exit_code_2_and_leaves_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "run"
    method = [] if "--recipe" in arguments else ["--method", "intraq"]
    assert cli.main(["quantize", *method, *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mirageq: ")
    assert message in error
    assert "Traceback" not in error
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize("section", SECTIONS)
def test_a_recipe_with_a_value_in_place_of_a_section_is_told(section, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(f"{section} = 3\n")
    arguments = ["--method", "zeroq", "--bits", "w4a4", "--recipe", str(tmp_path / "recipe.toml")]
    assert cli.main(["quantize", *TINY, *arguments, "--out", str(tmp_path / "run")]) == 2
    assert f"'{section}' is a section of a recipe, [{section}], not a single value; got 3." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_fit_names_the_first_wrong_keys(tmp_path, capsys):
    state = TinyResNet().state_dict()
    state["conv9.weight"] = state.pop("conv1.weight")
    save_file(state, tmp_path / "weights.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "weights.safetensors"), "--out", str(tmp_path / "run")]
    assert cli.main(["quantize", *TINY, "--recipe", "squant", *arguments]) == 2
    error = capsys.readouterr().err
    assert "conv1.weight" in error
    assert "conv9.weight" in error


def test_a_folder_with_another_run_is_not_touched(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert quantize(finished) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_folder_with_other_files_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert quantize(tmp_path) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_output_that_cannot_be_written_is_told_before_any_work(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert quantize(blocked) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    if os.geteuid() == 0:
        assert quantize("/proc/mirageq") == 2
    else:
        tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
        assert quantize(tmp_path / "run") == 2
        tmp_path.chmod(stat.S_IRWXU)
    assert "cannot be written" in capsys.readouterr().err


def test_resuming_says_what_is_wrong(finished, tmp_path, capsys):
    assert cli.main(["quantize", "--resume", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert cli.main(["quantize", "--resume", str(finished)]) == 2
    assert "is finished already" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"format": 99}')
    assert cli.main(["show", str(tmp_path)]) == 2
    assert "format 99" in capsys.readouterr().err
    record = json.loads((finished / "run.json").read_text())
    for text, told in (
        ('{"form', "is damaged"),
        ("[]", "is not the record of a run"),
        ('{"format": 1}', "is damaged (no network)"),
        (json.dumps(record | {"network": []}), "is damaged (no table)"),
        (json.dumps(record | {"network": {}}), "is damaged (no checkpoint)"),
        ("\xff", "is damaged"),
    ):
        (tmp_path / "run.json").write_bytes(text.encode("latin1"))
        assert cli.main(["show", str(tmp_path)]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--bits", "w8a8"], "--bits"),
        (["--set", "tuner.lr=1", "--seed", "0"], "--set, --seed"),
        (["--recipe", "nope", "--out", "elsewhere"], "--recipe, --out"),
    ],
)
def test_what_a_run_began_with_cannot_be_changed_when_it_is_continued(finished, more, told, capsys):
    assert cli.main(["quantize", "--resume", str(finished), *more]) == 2
    assert f"goes on as it was begun; leave out {told}." in capsys.readouterr().err


def test_a_network_that_has_changed_is_not_continued(tmp_path, capsys):
    (tmp_path / "net.py").write_text("from mirageq.testing import TinyResNet as build\n")
    network = [f"py:{tmp_path / 'net.py'}:build", "--image-shape", "3,16,16"]
    out = tmp_path / "run"
    assert cli.main(["synthesize", *network, "--method", "noise", "--count", "2", "--out", str(out)]) == 0
    assert cli.main(["export", str(out), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "holds only images, made by mirageq synthesize" in capsys.readouterr().err
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
    changed = "def build():\n    model = TinyResNet()\n    model.linear.weight.data += 1\n    return model\n"
    (tmp_path / "net.py").write_text("from mirageq.testing import TinyResNet\n" + changed)
    sys.modules.pop("net", None)
    assert cli.main(["quantize", "--resume", str(out)]) == 2
    assert "The network has changed since" in capsys.readouterr().err


def test_options_that_cannot_count_are_refused(finished, tmp_path, capsys):
    images = ["--images", str(finished), "--method", "zeroq", "--out", str(tmp_path / "run")]
    assert cli.main(["quantize", *TINY, *images]) == 2
    assert "leave out --method." in capsys.readouterr().err
    assert cli.main(["evaluate", str(finished), "--data", "x", "--checkpoint", "nope.safetensors"]) == 2
    assert "knows its network; leave out --checkpoint." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["pack", "RUN", "--out", "OUT", "--count", "0"],
            "argument --count: expected a whole number, 1 at least, got '0'",
        ),
        (["pack", "RUN", "--out", "OUT", "--count", "-3"], "--count"),
        (["synthesize", *TINY, "--out", "OUT", "--count", "many"], "1 at least, got 'many'"),
        (["export", "RUN", "--out", "OUT", "--images", "0"], "--images"),
        (["export", "RUN", "--out", "OUT", "--threads", "-3"], "0 at least, got '-3'"),
        (["evaluate", "RUN", "--data", "x", "--limit", "0"], "--limit"),
        (["pack", "RUN", "--out", "OUT", "--mean", "a"], "expected numbers separated by commas, got 'a'"),
    ],
)
def test_numbers_that_cannot_be_are_refused(finished, arguments, told, tmp_path, capsys):
    places = {"RUN": str(finished), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stopped:
        cli.main([places.get(argument, argument) for argument in arguments])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pack_is_not_written_if_its_copies_cannot_be(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "kept.npy").write_text("precious")
    normalised = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--out", str(tmp_path / "pack")]
    other = tmp_path / "of two channels"
    two = [f"{HERE}:TwoChannels", "--image-shape", "2,16,16"]
    assert cli.main(["synthesize", *two, "--method", "noise", "--count", "2", "--out", str(other)]) == 0
    assert cli.main(["pack", str(other), "--out", str(tmp_path / "pack"), "--folder", str(tmp_path / "png")]) == 2
    assert "Images of 2 channels cannot be PNG files" in capsys.readouterr().err
    for copy, told in (
        (["--folder", tmp_path / "file"], "is a file"),
        (["--numpy", tmp_path / "no" / "x.npy"], "no folder"),
        (["--numpy", tmp_path / "x.array"], "--numpy writes a .npy file"),
        (["--numpy", tmp_path / "kept.npy"], "exists already"),
        (["--folder", tmp_path / "pack" / "png"], "lies in the pack"),
    ):
        assert cli.main(["pack", str(finished), *normalised, *map(str, copy)]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "pack").exists()
    assert cli.main(["pack", str(finished), *normalised]) == 0
    assert (tmp_path / "kept.npy").read_text() == "precious"


def test_too_few_images_to_prove_a_file_are_told(tmp_path, capsys):
    assert cli.main(["quantize", *TINY, "--recipe", "squant", "--out", str(tmp_path / "run")]) == 0
    out = ["--out", str(tmp_path / "model.onnx"), "--runtimes", "onnxruntime", "--threads", "1"]
    assert cli.main(["export", str(tmp_path / "run"), *out]) == 0
    assert "There are 8 images to prove it on, and not 500; --data gives others." in capsys.readouterr().out


def test_a_file_is_proved_on_labelled_images_that_are_scaled(tmp_path, capsys):
    normalised = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    assert cli.main(["quantize", *TINY, *normalised, "--recipe", "squant", "--out", str(tmp_path / "run")]) == 0
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 12, 3), np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(9) % 5)
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "model.onnx"), "--runtimes", "onnxruntime"]
    export += ["--threads", "1", "--images", "5", "--data", str(tmp_path / "test.npz")]
    assert cli.main(export) == 2
    assert "Scale them up with --resize." in capsys.readouterr().err
    assert cli.main([*export, "--resize", "16"]) == 0
    printed = capsys.readouterr().out
    assert "onnxruntime  5 " in printed.replace("   ", "  ")
    assert "There are" not in printed


def test_a_missing_model_or_output_is_told(capsys):
    assert cli.main(["quantize", "--bits", "w4a4"]) == 2
    assert "needs a MODEL and --out FOLDER" in capsys.readouterr().err


def test_a_student_tuned_on_smaller_images_is_proved_at_the_networks_size(tmp_path, capsys):
    assert quantize(tmp_path / "run", "--set", "method.image_size=8") == 0
    out = ["--out", str(tmp_path / "model.onnx"), "--runtimes", "onnxruntime", "--threads", "1"]
    assert cli.main(["export", str(tmp_path / "run"), *out]) == 0
    assert "same class" in capsys.readouterr().out


def test_export_writes_a_proved_file_and_says_what_it_is(finished, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    assert cli.main(["export", str(finished), "--out", str(out), "--runtimes", "onnxruntime", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    for words in ("bytes of", "the file", "onnxruntime", "same class", "left in float", f"wrote {out}"):
        assert "".join(words.split()) in "".join(said.split())  # lines are broken anywhere in a long path
    assert out.stat().st_size > 1000
    assert cli.main(["export", str(finished), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_it_must_be_said_how(tmp_path, capsys):
    for command in ("quantize", "synthesize"):
        assert cli.main([command, *TINY, *QUICK, "--out", str(tmp_path / "run")]) == 2
        assert "Say how: --recipe squant" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_read_from_any_folder_and_shown_without_its_network(tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text("from mirageq.testing import TinyResNet as build\n")
    (tmp_path / "below").mkdir()
    save_file(TinyResNet().state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    network = ["py:net.py:build", "--image-shape", "3,16,16", "--checkpoint", "weights.safetensors"]
    normalised = ["--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"]
    assert cli.main(["quantize", *network, *normalised, "--recipe", "squant", "--out", "run"]) == 0
    monkeypatch.chdir(tmp_path / "below")
    assert cli.main(["export", "../run", "--out", "model.onnx"]) == 0
    assert cli.main(["quantize", *network[1:3], str(tmp_path / "net.py"), "--images", "../run"]) == 2
    (tmp_path / "net.py").unlink()
    capsys.readouterr()
    assert cli.main(["show", "../run"]) == 0
    assert "images.png" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_its_network_from_elsewhere(tmp_path, capsys):
    (tmp_path / "net.py").write_text("from mirageq.testing import TinyResNet as build\n")
    network, out = ["--image-shape", "3,16,16"], tmp_path / "run"
    command = ["synthesize", f"py:{tmp_path / 'net.py'}:build", *network, "--method", "noise", "--count", "2"]
    assert cli.main([*command, "--out", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
    (tmp_path / "net.py").rename(tmp_path / "moved.py")
    assert cli.main(["quantize", "--resume", str(out)]) == 2
    assert "cannot be imported" in capsys.readouterr().err
    assert cli.main(["quantize", f"py:{tmp_path / 'moved.py'}:build", "--resume", str(out)]) == 0
    assert "w4a4" not in capsys.readouterr().out  # it only makes images
    assert json.loads((out / "run.json").read_text())["network"]["name"] == f"py:{tmp_path / 'moved.py'}:build"


def test_an_unfinished_run_says_so_and_shows_its_curves(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr("mirageq.pipeline.teach", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert quantize(out) == 130
    (out / "synthetic.safetensors").rename(out / "synthetic.partial")
    capsys.readouterr()
    for command in (["show", str(out)], ["pack", str(out), "--out", str(tmp_path / "pack")]):
        assert cli.main(command) == 2
        assert f"go on with: mirageq quantize --resume {out}" in capsys.readouterr().err
    assert (out / "curves.png").exists()
    assert cli.main(["quantize", *TINY, "--images", str(out), "--out", str(tmp_path / "other")]) == 2
    assert "whose images are not all made" in capsys.readouterr().err
    assert cli.main(["export", str(out), "--out", str(tmp_path / "model.onnx")]) == 2
    assert f"{out} holds an unfinished run; finish it with: mirageq quantize --resume" in capsys.readouterr().err


def test_two_processes_never_work_on_one_run(tmp_path, capsys):
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    assert quantize(out) == 0
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with alone(out / "run.json"):
        assert cli.main(["quantize", "--resume", str(out)]) == 2
    assert f"Another process is at work in {out}" in capsys.readouterr().err


def test_a_disk_that_is_full_is_told(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "synthetic.partial")

    monkeypatch.setattr("mirageq.images._create", full)
    assert quantize(tmp_path / "run", "--method", "zeroq") == 2
    error = capsys.readouterr().err
    assert "No space left on device (synthetic.partial)" in error
    assert "mirageq quantize --resume" in error


def test_a_disk_that_is_full_at_once_leaves_no_half_of_a_record(tmp_path, capsys):
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        code = quantize(tmp_path / "run", "--method", "zeroq")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert "File too large" in (error := capsys.readouterr().err)
    assert "resume" not in error
    assert list((tmp_path / "run").iterdir()) == []
    assert quantize(tmp_path / "run", "--method", "zeroq") == 0


def test_what_cannot_be_shown_or_measured_is_told(finished, tmp_path, capsys):
    assert cli.main(["evaluate", str(finished)]) == 2
    assert "Measuring needs labelled images: --data" in capsys.readouterr().err
    assert cli.main(["show", str(finished), str(tmp_path)]) == 2
    assert "Runs are shown one at a time" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "mistyped"), "--data", str(tmp_path)]) == 2
    assert "There is no run" in capsys.readouterr().err


def test_written_files_can_be_read_by_others(finished):
    os.umask(mask := os.umask(0))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in finished.iterdir() if path.is_file()}
    assert modes == {0o666 & ~mask}


def test_a_method_from_a_file_is_found_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["synthesize", *TINY, "--method", "mine.py:Mine", "--count", "2", "--out", "run"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["method"]["name"] == f"{tmp_path / 'mine.py'}:Mine"
    assert Run.open(tmp_path / "run").recipe.images == 2
    (tmp_path / "mine.py").unlink()
    capsys.readouterr()
    assert cli.main(["show", "run"]) == 0


def test_the_example_of_a_method_is_found_by_its_file(tmp_path, capsys):
    example = str(Path(__file__).parents[1] / "examples" / "own_method.py")
    command = ["synthesize", *TINY, "--method", f"{example}:SmoothNoise", "--count", "2", "--set", "method.side=3"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert cli.main(["methods", f"{example}:SmoothNoise"]) == 0
    assert "A method of your own" in capsys.readouterr().out


def test_a_network_may_import_what_lies_beside_it_as_it_is_built(tmp_path):
    (tmp_path / "beside_it.py").write_text("from mirageq.testing import TinyResNet\n")
    build = "def build():\n    from beside_it import TinyResNet\n    return TinyResNet()\n"
    (tmp_path / "net.py").write_text(build)
    load_teacher(NetworkChoice(name=f"py:{tmp_path / 'net.py'}:build", image_shape=SHAPE))


def test_two_runs_begun_at_once_in_one_folder_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr("mirageq.run.check_folder", lambda folder: None)  # the other one begins right after it
    choice = NetworkChoice(name="py:mirageq.testing:TinyResNet", image_shape=SHAPE)
    recipe, teacher = Recipe(method=ZeroQ(iterations=2)), load_teacher(choice)
    Run.create(tmp_path / "run", choice, recipe, 0, teacher)
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UserError, match="holds a run that was begun at the same time"):
        Run.create(tmp_path / "run", choice, recipe, 1, teacher)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_run_that_is_stopped_while_it_is_begun_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr("mirageq.run.versions", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert quantize(tmp_path / "run") == 130
    monkeypatch.undo()
    assert quantize(tmp_path / "run") == 0


def test_a_student_that_could_not_be_stored_is_not_tuned_again(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise UserError("student.safetensors cannot be written: No space left on device.")

    monkeypatch.setattr("mirageq.run.save_student", full)
    assert quantize(tmp_path / "run", "--set", "tuner.batch_size=4") == 2
    monkeypatch.undo()
    monkeypatch.setattr("mirageq.tuning.distill._Run.update", None)  # no step is taken any more
    assert cli.main(["quantize", "--resume", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_goes_on_where_it_began_and_its_command_can_be_pasted(tmp_path, capsys, monkeypatch):
    out = tmp_path / "a [bold] run"
    monkeypatch.setattr("mirageq.pipeline.teach", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert quantize(out) == 130
    assert f"mirageq quantize --resume '{out}'" in capsys.readouterr().err
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr("mirageq.cli.making.device_name", lambda options: asked.append(options.device) or "cpu")
    assert cli.main(["quantize", "--resume", str(out)]) == 0
    assert asked == ["cpu"]  # and not a GPU that is there by now
    assert "[bold]run" in "".join(capsys.readouterr().out.split())


def test_images_to_prove_a_file_on_are_scaled_only_if_there_are_some(finished, tmp_path, capsys):
    assert cli.main(["export", str(finished), "--out", str(tmp_path / "m.onnx"), "--resize", "20"]) == 2
    assert "--resize scales the labelled images of --data" in capsys.readouterr().err


def test_a_run_that_another_process_finished_is_not_done_again(tmp_path):
    out = tmp_path / "run"
    assert quantize(out) == 0
    run = Run.open(out)
    run.record["status"] = "running"  # as it was read before the other process finished it
    with pytest.raises(UserError, match="was finished by another process meanwhile"):
        run.execute(load_teacher(run.choice))


@pytest.mark.parametrize("method", ["synq", "selectq", "union"])
def test_a_run_refused_by_a_part_of_its_method_leaves_nothing(method, tmp_path, capsys):
    network = [f"{HERE}:Normless", *SHAPED]
    assert cli.main(["quantize", *network, "--method", method, "--out", str(tmp_path / "run")]) == 2
    assert "no BatchNorm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_refused_when_it_goes_on_is_kept(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mirageq.pipeline.calibrate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    images = tmp_path / "images.safetensors"
    images.write_bytes((finished / "synthetic.safetensors").read_bytes())
    out = tmp_path / "run"
    tuned = [*QUICK[:4], *QUICK[-4:]]  # without the method's
    assert cli.main(["quantize", *TINY, "--images", str(images), *tuned, "--out", str(out)]) == 130
    images.unlink()
    assert cli.main(["quantize", "--resume", str(out)]) == 2
    assert "images.safetensors" in capsys.readouterr().err
    assert (out / "run.json").exists()


def test_the_working_folder_may_be_the_output(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quantize(".", "--set", "tuner.batch_size=32") == 2
    assert "batch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    normalised = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    assert cli.main(["pack", str(finished), *normalised, "--out", "."]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.npy", "pack.json", "pixels.npy"]


def test_a_file_is_proved_on_labelled_images_whose_normalisation_the_command_tells(finished, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(5))
    export = ["export", str(finished), "--out", str(tmp_path / "model.onnx"), "--runtimes", "onnxruntime"]
    export += ["--threads", "1", "--data", str(tmp_path / "test.npz")]
    assert cli.main(export) == 2
    assert "give its mean and std" in capsys.readouterr().err
    assert cli.main([*export, "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]) == 0


def test_memory_is_told_in_bytes_where_the_system_counts_kilobytes_and_where_it_does_not(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda _: type("usage", (), {"ru_maxrss": 5 * 2**20}))
    for platform, told in (("linux", 5 * 2**30), ("darwin", 5 * 2**20)):
        monkeypatch.setattr("mirageq.run.sys.platform", platform)
        assert peak_memory() == told
