"""Comparisons as a user makes them, on a small real network, in process."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest

from mirageq import cli, compare
from mirageq.compare import Comparison
from mirageq.data import open_images
from mirageq.errors import UserError
from mirageq.folders import alone
from mirageq.hashing import hash_tensors
from mirageq.methods.intraq import IntraQ
from mirageq.methods.noise import Noise
from mirageq.methods.zeroq import ZeroQ
from mirageq.models import NetworkChoice, load_teacher
from mirageq.observe import Observer
from mirageq.plan import Plan
from mirageq.recipe import SECTIONS
from mirageq.storage import load_student
from mirageq.testing import SHAPE

TINY = ["py:mirageq.testing:TinyResNet", "--image-shape", ",".join(map(str, SHAPE)), "--device", "cpu"]
NORMALISED = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
RECIPE = """
images = 12
calibration_images = 12
[tuner]
steps = 3
batch_size = 6
"""
PLAN = """
bits = ["w4a4", "w3a3"]
seeds = [0, 1]
[methods.noise]
[methods."zeroq, short"]
name = "zeroq"
iterations = 3
[methods.clusterq]
warmup = 3
width = 8
"""


@pytest.fixture
def place(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, *SHAPE[1:], 3), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=pixels, labels=np.arange(40) % 5)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "plan.toml").write_text(f'recipe = "{tmp_path / "recipe.toml"}"\n{PLAN}')
    return tmp_path


def run(place, *more, out="out"):
    data, plan = str(place / "test.npz"), str(place / "plan.toml")
    return cli.main(["compare", *TINY, *NORMALISED, "--plan", plan, "--data", data, "--out", str(place / out), *more])


def rows(place, out="out"):
    return [json.loads(line) for line in (place / out / "cells.jsonl").read_text().splitlines()]


def test_a_matrix_gives_a_table_a_plot_and_a_picture(place, capsys):
    assert run(place) == 0
    assert len(rows(place)) == 3 * 2 * 2
    text = (place / "out" / "table.md").read_text()
    assert "| zeroq, short |" in text
    assert "(2 seeds)" in text
    for said in ("weights ", "full precision", "Static ranges", "the last step's", "same bits"):
        assert said in text
    assert text in capsys.readouterr().out
    entries = json.loads((place / "out" / "table.json").read_text())
    assert len(entries) == 3 * 2
    ours = [row["top1"] for row in rows(place) if row["method"] == "noise" and row["bits"] == "w4a4"]
    assert entries[0]["top1"] == pytest.approx(np.mean(ours))
    assert entries[0]["spread"] == pytest.approx(np.std(ours, ddof=1))
    assert "| images from | w4a4 top-1 | drop | KL |" in text
    diverged = [row["divergence"] for row in rows(place) if row["method"] == "noise" and row["bits"] == "w4a4"]
    line = next(line for line in text.splitlines() if line.startswith("| noise | "))
    assert line.split(" | ")[3] == f"{np.mean(diverged):.3f}"
    assert "KL is the divergence" in text
    assert entries[0]["divergence"] == pytest.approx(np.mean(diverged))
    for name in ("accuracy.png", "features.png"):
        assert (place / "out" / name).stat().st_size > 5000


def test_images_serve_every_bit_width_and_cells_repeat_to_the_same_figures(place):
    assert run(place, "--seeds", "0") == 0
    assert run(place, "--seeds", "0", out="again") == 0
    first, again = rows(place), rows(place, "again")
    for name in ("divergence", "images", "student_sha256"):
        assert [row[name] for row in first] == [row[name] for row in again]
    painted = {row["images"]["sha256"] for row in first if row["method"] == "zeroq, short" and row["seed"] == 0}
    assert len(painted) == 1


def test_cells_side_by_side_are_those_of_one_process(place, capsys):
    few = ["--methods", "clusterq", "--seeds", "0"]
    assert run(place, *few, "--jobs", "2", out="two") == 0
    told = capsys.readouterr().out
    assert "images of clusterq-12-seed0: begun; its log is" in told
    assert run(place, *few, out="one") == 0
    figures = ("label", "top1", "divergence", "images")
    one, two = (sorted([row[name] for name in figures] for row in rows(place, out)) for out in ("one", "two"))
    assert len(one) == 2
    assert one == two
    assert (place / "two" / "table.md").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_fails_beside_others_is_told_once_they_are_finished(place, capsys, jobs):
    plan = place / "plan.toml"
    plan.write_text(plan.read_text().split("[methods")[0] + "[methods.zeroq]\nlr = 1e30\n[methods.noise]\n")
    assert run(place, "--seeds", "0", "--bits", "w4a4", "--jobs", jobs) == 2
    told = capsys.readouterr().err
    assert "| noise |" in (place / "out" / "table.md").read_text()
    assert "All else is finished, but not:\nzeroq w4a4 seed0: The synthesis loss became " in told
    assert "Lower lr." in told
    assert [row["label"] for row in rows(place)] == ["noise w4a4 seed0"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_variant_that_does_not_fit_costs_no_other(place, capsys, jobs):
    plan = place / "plan.toml"
    plan.write_text(plan.read_text() + '[variants]\n"" = []\nbig = ["tuner.batch_size=999"]\n')
    picked = ["--only", "zeroq", "--seeds", "0", "--bits", "w4a4"]
    assert run(place, *picked, "--jobs", jobs) == 2
    told = capsys.readouterr().err
    assert "zeroq, short w4a4 seed0 big: The batch size 999 is larger than" in told
    assert [row["variant"] for row in rows(place)] == [""]


def test_a_mistake_in_a_methods_code_costs_its_cell_alone(place, capsys, monkeypatch):
    monkeypatch.setattr(ZeroQ, "synthesize", lambda *_, **__: 1 / 0)
    plan = place / "plan.toml"
    plan.write_text(plan.read_text().split("[methods.clusterq]")[0])
    assert run(place, "--seeds", "0", "--bits", "w4a4") == 2
    told = capsys.readouterr().err
    assert "zeroq, short w4a4 seed0: ZeroDivisionError: division by zero" in told
    assert "Traceback" in told
    assert [row["method"] for row in rows(place)] == ["noise"]


def test_logs_of_comparisons_that_share_their_work_lie_apart(place):
    for out in ("one", "two"):
        few = ["--methods", "noise", "--seeds", "0", "--bits", "w4a4", "--jobs", "2", "--work", str(place / "work")]
        assert run(place, *few, out=out) == 0
    logs = list((place / "work" / "tasks").glob("*/noise_w4a4_seed0.log"))
    assert sorted(log.parent.name.split("-")[0] for log in logs) == ["one", "two"]


def test_memory_does_not_grow_with_the_images_that_are_looked_at(place, monkeypatch):
    look, seen, alive = Observer.__call__, [], []

    def watched(self, images):
        alive.append(sum(each() is not None for each in seen))
        observation = look(self, images)
        seen.append(weakref.ref(observation))
        return observation

    monkeypatch.setattr(Observer, "__call__", watched)
    (place / "recipe.toml").write_text(RECIPE.replace("images = 12", "images = 256", 1))
    run(place, "--methods", "noise", "--bits", "w4a4", "--seeds", "0")
    assert len(alive) >= 4
    assert max(alive) <= 1


def test_an_interrupted_matrix_goes_on_where_it_was(place, monkeypatch, capsys):
    whole = run(place, out="whole")
    teach, calls = compare.teach, []

    def stumbling(*args, **settings):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return teach(*args, **settings)

    monkeypatch.setattr(compare, "teach", stumbling)
    assert run(place) == 130
    assert "4 cells in" in capsys.readouterr().err
    assert len(rows(place)) == 4
    assert run(place) == whole == 0
    assert len(calls) == 5 + 8
    assert [(row["label"], row["top1"]) for row in rows(place)] == [
        (row["label"], row["top1"]) for row in rows(place, "whole")
    ]


def test_cells_of_before_divergences_were_measured_have_no_column_of_them(place, capsys):
    run(place, "--methods", "noise", "--bits", "w4a4")
    path = place / "out" / "cells.jsonl"
    older = [{name: value for name, value in row.items() if name != "divergence"} for row in rows(place)]
    path.write_text("".join(json.dumps(row) + "\n" for row in older))
    assert cli.main(["show", str(place / "out")]) == 0
    text = (place / "out" / "table.md").read_text()
    assert "| images from | w4a4 top-1 | drop |\n| --- | ---: | ---: |" in text
    assert "KL is the divergence" not in text
    assert "divergence" not in json.loads((place / "out" / "table.json").read_text())[0]


def test_a_cut_line_costs_only_its_cell(place):
    assert run(place, "--only", "noise") == 0
    path = place / "out" / "cells.jsonl"
    path.write_text(path.read_text()[:-30])
    assert run(place, "--only", "noise") == 0
    assert len(rows(place)) == 4


def test_damaged_features_are_told(place):
    assert run(place, "--only", "noise w4a4 seed0") == 0
    next(place.glob("out/work/images/*/features.safetensors")).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"features.safetensors is damaged .*; delete it"):
        Comparison.open(place / "out").features()


def test_a_cell_is_named_once(place):
    plan = Plan.of({"methods": {"noise": {}}, "bits": ["w4a4", " W4A4"], "seeds": [1, 1]}, "the plan")
    assert [cell.label for cell in plan.cells()] == ["noise w4a4 seed1"]


def test_two_commands_never_fill_one_comparison(place, capsys):
    pytest.importorskip("fcntl")
    assert run(place, "--only", "noise w4a4 seed0") == 0
    with alone(place / "out" / "protocol.json"):
        assert run(place, "--only", "noise w3a3 seed0") == 2
    assert "Another process is at work in" in capsys.readouterr().err
    assert len(rows(place)) == 1


def test_a_damaged_line_is_told_unless_it_is_the_last(tmp_path):
    comparison, path = Comparison(tmp_path, None), tmp_path / "cells.jsonl"
    path.write_text('{"label": "a"}\n{"label": "b"}\n{"lab')
    assert [row["label"] for row in comparison.rows()] == ["a", "b"]
    path.write_text('{"label": "a"}\n{"lab\n{"label": "c"}\n')
    with pytest.raises(UserError, match=r"cells\.jsonl is damaged in line 2; mend that line or take it out"):
        comparison.rows()


def test_another_protocol_is_refused_and_nothing_is_lost(place, capsys):
    assert run(place, "--only", "noise w4a4 seed0") == 0
    before = (place / "out" / "cells.jsonl").read_text()
    (place / "recipe.toml").write_text(RECIPE.replace("steps = 3", "steps = 4"))
    assert run(place) == 2
    said = capsys.readouterr().err
    assert "not measured under one protocol: recipe.tuner.steps is 4 in the first and 3 in the second" in said
    assert (place / "out" / "cells.jsonl").read_text() == before


def test_a_method_whose_settings_changed_is_refused(place, capsys):
    assert run(place, "--only", "zeroq", "w4a4", "seed0") == 0
    plan = place / "plan.toml"
    plan.write_text(plan.read_text().replace("iterations = 3", "iterations = 4"))
    assert run(place) == 2
    assert "zeroq, short w4a4 seed0 was made with method.iterations = 3, and the plan says 4" in capsys.readouterr().err
    assert run(place, "--only", "w3a3", "zeroq", "seed0") == 2
    assert "iterations = 3, and the plan says 4" in capsys.readouterr().err


def test_settings_that_are_newer_than_a_comparison_count_as_their_defaults(place):
    assert run(place, "--only", "noise w4a4 seed0") == 0
    protocol, cells = (place / "out" / name for name in ("protocol.json", "cells.jsonl"))
    table, row = json.loads(protocol.read_text()), rows(place)[0]
    for recipe in (table["recipe"], row["recipe"]):
        del recipe["scheme"]["learned_steps"], recipe["tuner"]["mix"]
    protocol.write_text(json.dumps(table))
    cells.write_text(json.dumps(row) + "\n")
    assert run(place, "--only", "noise w4a4 seed0") == 0
    assert len(rows(place)) == 1


def test_settings_that_are_newer_than_the_images_count_as_their_defaults(place, capsys):
    assert run(place, "--only", "zeroq", "w4a4", "seed0") == 0
    (path,) = (place / "out" / "work").rglob("made_by.json")
    noted = json.loads(path.read_text())
    del noted["method"]["swing"]
    path.write_text(json.dumps(noted))
    plan = place / "plan.toml"
    unchanged = plan.read_text()
    plan.write_text(unchanged.replace("iterations = 3", "iterations = 4"))
    assert run(place, "--only", "zeroq", "w3a3", "seed0") == 2
    assert "iterations = 3, and the plan says 4" in capsys.readouterr().err
    plan.write_text(unchanged)
    assert run(place, "--only", "zeroq", "w3a3", "seed0") == 0
    assert len(rows(place)) == 2


def test_show_joins_comparisons_of_one_protocol_and_refuses_others(place, capsys):
    assert run(place, "--only", "noise", out="one") == 0
    assert run(place, "--only", "zeroq", out="two") == 0
    capsys.readouterr()
    assert cli.main(["show", str(place / "one"), str(place / "two")]) == 0
    said = capsys.readouterr().out
    assert "| noise |" in said
    assert "| zeroq, short |" in said
    assert run(place, "--limit", "10", "--only", "noise", out="other") == 0
    assert cli.main(["show", str(place / "one"), str(place / "other")]) == 2
    assert "were not measured under one protocol: data_sha256" in capsys.readouterr().err
    assert cli.main(["show", str(place / "one"), str(place)]) == 2
    assert "holds no comparison" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("seeds = [0, 1]", "seed = [0, 1]"), "has no setting 'seed'; did you mean 'seeds'"),
        (("w3a3", "w1a3"), "weight bits must be a whole number from 2 to 8; got 1"),
        (("seeds = [0, 1]", 'seeds = ["a"]'), "'seeds' expects"),
        (("seeds = [0, 1]", "seeds = []"), "at least one of its seeds"),
        (("iterations = 3", "iteration = 3"), "has no setting 'iteration'"),
        (("[methods.noise]", "[methods.nois]"), "There is no method 'nois'"),
    ],
)
def test_a_plan_with_a_mistake_is_refused_before_anything_is_written(place, capsys, edit, message):
    plan = place / "plan.toml"
    plan.write_text(plan.read_text().replace(*edit))
    assert run(place) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_recipe_with_a_value_in_place_of_a_section_is_refused(place, capsys, section):
    (place / "recipe.toml").write_text(f"{section} = 3\n")
    assert run(place) == 2
    assert f"'{section}' is a section of a recipe, [{section}], not a single value; got 3." in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_folder_that_holds_something_else_is_refused(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "letter.txt").write_text("dear")
    assert run(place) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (place / "out").iterdir()] == ["letter.txt"]


def test_a_comparison_without_network_data_or_folder_is_refused(capsys):
    assert cli.main(["compare", "--methods", "noise"]) == 2
    assert "needs a MODEL, --data and --out" in capsys.readouterr().err


def test_the_command_line_needs_no_plan(place):
    arguments = ["--methods", "noise", "--bits", "w8a8", "--seeds", "0", "--recipe", str(place / "recipe.toml")]
    data = ["--data", str(place / "test.npz"), "--out", str(place / "out")]
    assert cli.main(["compare", *TINY, *NORMALISED, *arguments, *data]) == 0
    assert [row["label"] for row in rows(place)] == ["noise w8a8 seed0"]


def test_the_command_line_picks_from_the_plan(place):
    assert run(place, "--methods", "zeroq, short", "--bits", "w4a4", "--seeds", "1") == 2  # a comma separates
    assert run(place, "--methods", "clusterq", "--bits", "w4a4", "--seeds", "1") == 0
    assert [row["label"] for row in rows(place)] == ["clusterq w4a4 seed1"]
    assert rows(place)[0]["recipe"]["method"]["warmup"] == 3


def test_a_variant_with_more_images_has_images_of_its_own(place):
    plan = place / "plan.toml"
    plan.write_text(plan.read_text() + '[variants]\n"" = []\n"6 images" = ["images=6", "calibration_images=6"]\n')
    assert run(place, "--only", "zeroq, short", "w4a4", "seed1") == 0
    assert [row["label"][-8:] for row in rows(place)] == ["a4 seed1", "6 images"]
    assert len({row["images"]["sha256"] for row in rows(place)}) == 2


def test_variants_are_cells_of_their_own():
    plan = Plan.of({"methods": {"noise": {}}, "variants": {"a": [], "b": ["tuner.steps=7"]}}, "plan")
    assert [cell.label for cell in plan.cells()] == ["noise w4a4 seed0 a", "noise w4a4 seed0 b"]
    assert plan.recipe_of(plan.cells()[1]).tuner.steps == 7
    with pytest.raises(UserError, match="at least one of its methods"):
        Plan.of({}, "plan")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"methods": {"zeroq": "fast"}}, "methods.zeroq of plan is a table, not a value; got 'fast'"),
        ({"methods": ["zeroq"]}, r"methods of plan is a table, not a value; got \['zeroq'\]"),
        ({"methods": {"noise": {}}, "variants": ["a"]}, "variants of plan is a table"),
        (
            {"methods": {"noise": {}}, "variants": {"a": [1]}},
            r'variants.a of plan is a list of texts, "key=value"; got',
        ),
        ({"methods": {"noise": {}}, "variants": {"a": "tuner.steps=1"}}, "variants.a of plan is a list of texts"),
        ({"method": {}}, "plan has no setting 'method'; did you mean 'methods'"),
    ],
)
def test_what_does_not_fit_in_a_plan_is_told(table, message):
    with pytest.raises(UserError, match=message):
        Plan.of(table, "plan")


def test_a_plan_that_is_missing_or_picks_nothing_is_told_and_nothing_is_written(place, capsys):
    assert run(place, "--only", "noize") == 2
    assert "No cell's label has 'noize'; one of them is 'noise w4a4 seed0'." in capsys.readouterr().err
    (place / "plan.toml").unlink()
    assert run(place) == 2
    assert "There is no plan" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_the_recipes_own_method_keeps_its_settings_where_the_plan_says_nothing(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[method]\nname = "zeroq"\niterations = 7\nbatch_size = 3\n')
    methods = {"zeroq": {"batch_size": 2}, "noise": {}, "again": {"name": "zeroq"}}
    plan = Plan.of({"recipe": str(recipe), "methods": methods}, "plan")
    built = [plan.recipe_of(cell).method for cell in plan.cells()]
    assert built == [ZeroQ(iterations=7, batch_size=2), Noise(), ZeroQ(iterations=7, batch_size=3)]
    recipe.write_text("[method]\niterations = 7\n")  # of the method that needs no name
    (cell,) = (plan := Plan.of({"recipe": str(recipe), "methods": {"intraq": {"batch_size": 2}}}, "plan")).cells()
    assert plan.recipe_of(cell).method == IntraQ(iterations=7, batch_size=2)


def test_one_place_of_work_may_serve_other_recipes_but_no_other_network(place, capsys):
    work = ["--work", str(place / "work"), "--methods", "noise", "--bits", "w4a4", "--seeds", "0"]
    assert run(place, *work) == 0
    (place / "recipe.toml").write_text(RECIPE.replace("steps = 3", "steps = 4"))
    assert run(place, *work, out="longer") == 0
    assert len(list((place / "work" / "images").iterdir())) == 1
    assert len(list((place / "work" / "cells").iterdir())) == 2
    arguments = [*NORMALISED, "--recipe", str(place / "recipe.toml"), "--data", str(place / "test.npz"), *work]
    network = ["py:mirageq.testing:TinyDense", *TINY[1:], "--out", str(place / "other")]
    assert cli.main(["compare", *network, *arguments]) == 2
    assert "noise-12-seed0 was made with network = " in capsys.readouterr().err


def test_images_of_another_normalisation_are_not_shared(place, capsys):
    only, work = ["--methods", "noise", "--bits", "w4a4", "--seeds", "0"], ["--work", str(place / "work")]
    assert run(place, *only, *work) == 0
    assert run(place, *only, *work, "--mean", "0.4,0.4,0.4", out="other") == 2
    assert "was made with mean = [0.5, 0.5, 0.5], and the plan says [0.4, 0.4, 0.4]" in capsys.readouterr().err


def test_a_damaged_protocol_is_told(place, capsys):
    assert run(place, "--only", "noise w4a4 seed0") == 0
    path = place / "out" / "protocol.json"
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        assert cli.main(["show", str(place / "out")]) == 2
        assert f"{path} is damaged or of another version" in capsys.readouterr().err


VARIANTS = """
[variants]
"more steps" = ["tuner.steps=4"]
"" = []
"""


def test_a_variant_may_be_picked_before_the_rest_or_after(place):
    plan = place / "plan.toml"
    plan.write_text(plan.read_text() + VARIANTS)
    few = ["--methods", "noise", "--bits", "w4a4", "--seeds", "0"]
    assert run(place, *few, "--only", "more steps") == 0
    assert run(place, *few) == 0
    assert run(place, *few, out="other") == 0
    assert run(place, *few, "--only", "more steps", out="other") == 0
    assert len(rows(place)) == len(rows(place, "other")) == 2


def test_variants_of_a_methods_own_settings_are_refused_at_once(place, capsys):
    plan = place / "plan.toml"
    plan.write_text(plan.read_text() + VARIANTS.replace("tuner.steps=4", "method.iterations=4"))
    assert run(place, "--only", "zeroq", "seed0") == 2
    assert "would share their images, and their settings of the method differ" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_students_of_finished_cells_are_kept(place):
    assert run(place, "--methods", "noise", "--bits", "w4a4", "--seeds", "0") == 0
    (file,) = (place / "out" / "work" / "cells").rglob("student.safetensors")
    teacher = load_teacher(NetworkChoice(name=TINY[0], image_shape=SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3))
    student = load_student(file, teacher)
    data = open_images(place / "test.npz", SHAPE)
    (row,) = rows(place)
    measured = compare.accuracy(student, data, teacher.mean, teacher.std, teacher=teacher)
    assert (measured.top1, measured.divergence) == (row["top1"], row["divergence"])
    assert hash_tensors(student.state_dict()) == row["student_sha256"]


def test_tuning_that_is_finished_is_not_done_again(place, monkeypatch):
    only, measure = ["--methods", "noise", "--bits", "w4a4", "--seeds", "0"], compare.accuracy
    assert run(place, *only, out="whole") == 0

    def stopped(*arguments, teacher=None, **settings):
        if teacher:  # a student is measured, and not the network itself
            raise KeyboardInterrupt
        return measure(*arguments, **settings)

    monkeypatch.setattr(compare, "accuracy", stopped)
    assert run(place, *only) == 130
    monkeypatch.setattr(compare, "accuracy", measure)
    monkeypatch.setattr(Comparison, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(place, *only) == 130  # and nothing is forgotten before its row is kept
    monkeypatch.undo()
    monkeypatch.setattr("mirageq.tuning.distill._Run.update", None)  # no step is taken any more
    assert run(place, *only) == 0
    assert rows(place)[0]["divergence"] == rows(place, "whole")[0]["divergence"]
    assert not list((place / "out" / "work" / "cells").rglob("*.pt"))
