from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mirageq import recipe
from mirageq.errors import UserError
from mirageq.methods.intraq import IntraQ
from mirageq.methods.noise import Noise
from mirageq.methods.union import Union
from mirageq.methods.zeroq import ZeroQ
from mirageq.tuning import Distill


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_builds_and_survives_a_round_trip(name):
    built = recipe.build(recipe.read(name))
    assert recipe.build(recipe.describe(built)) == built


def test_the_paper_recipes_carry_the_papers_values():
    settings = {name: recipe.build(recipe.read(f"intraq-{name}")) for name in ("cifar10", "cifar100", "imagenet")}
    margins = {
        name: (built.method.target_low, built.method.margin_low, built.method.margin_high)
        for name, built in settings.items()
    }
    assert margins == {"cifar10": (0.95, 0.05, 0.8), "cifar100": (0.6, 0.02, 1.0), "imagenet": (0.9, 0.3, 0.8)}
    for built in settings.values():
        assert built.images == 5120
        assert (built.method.batch_size, built.method.iterations, built.method.lr) == (256, 1000, 0.5)
        assert built.tuner.steps == 29400
        assert built.scheme.bits == "w4a4"
        assert built.scheme.placement == "paper"


def test_texts_are_converted_to_the_types_of_the_settings():
    table = recipe.assign(
        {}, ["images=32", "method.lr=0.25", "tuner.milestones=[0.1, 0.2]", "scheme.first_last_bits=8"]
    )
    built = recipe.build(table)
    assert built.images == 32
    assert built.method == IntraQ(lr=0.25)
    assert built.tuner == Distill(milestones=(0.1, 0.2))
    assert built.scheme.first_last_bits == 8


def test_a_method_from_outside_is_found_by_its_path():
    built = recipe.build({"method": {"name": "mirageq.methods.stored:Stored", "path": "x"}})
    assert type(built.method).__name__ == "Stored"
    assert recipe.describe(built)["method"] == {"name": "mirageq.methods.stored:Stored", "path": "x"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": {"name": "itnraq"}}, "no method 'itnraq'; did you mean 'intraq'"),
        ({"method": {"name": "nowhere:Method"}}, "cannot be imported"),
        ({"method": {"name": "mirageq.teacher:Teacher"}}, "is not a method"),
        ({"method": {"iteratoins": 3}}, "method has no setting 'iteratoins'; did you mean 'iterations'"),
        ({"method": {"iterations": "many"}}, "method: 'iterations' expects int; got 'many'"),
        ({"method": {"name": "mirageq.methods.stored:Stored"}}, "method needs a value for 'path'"),
        ({"method": {"iterations": 0}}, "iterations must be positive; got 0"),
        ({"method": {"margin_low": 0.9}}, "margin_low <= margin_high"),
        ({"method": {"target_low": 1.5}}, r"target_low lies in \[0, 1\]; got 1.5"),
        ({"method": {"crop_scale": 0.0}}, "crop_scale is a fraction"),
        ({"tuner": {"name": "distil"}}, "no tuner 'distil'; did you mean 'distill'"),
        ({"tuner": {"schedule": "linear"}}, "'schedule' expects"),
        ({"tuner": {"lr": -1.0}}, "lr must be positive"),
        ({"scheme": {"weight_bits": 9}}, "weight_bits must be a whole number from 2 to 8; got 9"),
        ({"image": 3}, "the recipe has no setting 'image'; did you mean 'images'"),
        ({"images": 0}, "images must be positive; got 0"),
        ({"tuner": 3}, "'tuner' is a section"),
        ({"methd": {"lr": 0.1}}, "the recipe has no setting 'methd'; did you mean 'method'"),
        ({"method": {"name": 3}}, "method: 'name' is a text; got 3"),
        ({"tuner": {"name": ["distill"]}}, r"tuner: 'name' is a text; got \['distill'\]"),
        ({"method": {"name": "union", "first": {"name": 3}}}, "method.first: 'name' is a text; got 3"),
        ({"scheme": {"placement": "both"}}, "scheme: 'placement' expects 'paper' or 'deploy'; got 'both'"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(table, message):
    with pytest.raises(UserError, match=message):
        recipe.build(table)


@pytest.mark.parametrize("name", recipe.SECTIONS)
def test_a_value_in_place_of_a_section_is_told_although_the_bits_are_set(name):
    with pytest.raises(UserError, match=rf"^'{name}' is a section of a recipe, .* not a single value; got 3\.$"):
        recipe.build(recipe.set_bits({name: 3}, "w4a4"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("images", "given as key=value; got 'images'"),
        ("tunner.lr=1", "no section 'tunner'.*did you mean 'tuner'"),
        ("method.name.x=3", "'name' is a single value and has no 'x'; got 'method.name.x=3'"),
    ],
)
def test_malformed_assignments_are_told(assignment, message):
    with pytest.raises(UserError, match=message):
        recipe.assign({"method": {"name": "zeroq"}}, [assignment])


def test_a_recipe_that_is_missing_or_damaged_is_told(tmp_path):
    with pytest.raises(UserError, match="no recipe 'intraq-cifar'.*did you mean 'intraq-cifar10"):
        recipe.read("intraq-cifar")
    (tmp_path / "bad.toml").write_text("images = = 3")
    with pytest.raises(UserError, match=r"bad.toml is not a TOML file"):
        recipe.read(str(tmp_path / "bad.toml"))


def test_a_recipe_builds_on_another(tmp_path):
    middle, top = tmp_path / "middle.toml", tmp_path / "top.toml"
    middle.write_text('base = "best-cifar10"\n[tuner.then]\nsteps = 7\n[method]\nname = "zeroq"\niterations = 3\n')
    top.write_text(f'base = "{middle}"\nimages = 5\n[scheme]\nweight_bits = 2\n')
    base, built = (recipe.build(recipe.read(name)) for name in ("best-cifar10", str(top)))
    assert (built.images, built.calibration_images, built.scheme.bits) == (5, base.calibration_images, "w2a4")
    assert built.tuner == replace(base.tuner, then=replace(base.tuner.then, steps=7))
    assert built.method == ZeroQ(iterations=3)  # nothing of the base's method, which is another


def test_a_base_lies_beside_the_file_that_names_it(tmp_path):
    (tmp_path / "base.toml").write_text("images = 5")
    (tmp_path / "top.toml").write_text('base = "base.toml"')
    assert recipe.read(str(tmp_path / "top.toml")) == {"images": 5}


def test_a_recipe_can_leave_out_a_part_of_its_base(tmp_path):
    (tmp_path / "two.toml").write_text('base = "best-cifar10"\n[method]\nthird = false\n')
    base, built = (recipe.build(recipe.read(name)) for name in ("best-cifar10", str(tmp_path / "two.toml")))
    assert base.method.third
    assert built.method == replace(base.method, third=None)


def test_a_base_that_leads_nowhere_is_told(tmp_path):
    (tmp_path / "a.toml").write_text(f'base = "{tmp_path / "b.toml"}"')
    (tmp_path / "b.toml").write_text(f'base = "{tmp_path / "a.toml"}"')
    with pytest.raises(UserError, match=r"a\.toml' is its own base: .*a\.toml -> .*b\.toml -> .*a\.toml"):
        recipe.read(str(tmp_path / "a.toml"))
    (tmp_path / "c.toml").write_text('base = "demos"')
    with pytest.raises(UserError, match=r"no recipe 'demos'"):
        recipe.read(str(tmp_path / "c.toml"))
    (tmp_path / "c.toml").write_text("base = 3")
    with pytest.raises(UserError, match=r"base names another recipe, as text; got 3 in .*c\.toml"):
        recipe.read(str(tmp_path / "c.toml"))


def test_a_section_without_a_name_is_what_it_is_by_default():
    base = {"method": {"iterations": 5}, "tuner": {"steps": 3}}
    for name in ({}, {"name": "distill"}):
        built = recipe.build(recipe.laid_over(base, {"tuner": {**name, "lr": 1e-4}}))
        assert (built.tuner.steps, built.tuner.lr, built.method.iterations) == (3, 1e-4, 5)
    assert recipe.laid_over(base, {"method": {"name": "zeroq"}})["method"] == {"name": "zeroq"}


def test_a_part_without_a_name_is_what_its_method_has_there_by_itself():
    table = {"method": {"name": "union", "first": {"iterations": 4}, "second": {"iterations": 5, "class_weight": 0.3}}}
    assert recipe.build(table).method == Union(first=IntraQ(iterations=4), second=ZeroQ(iterations=5, class_weight=0.3))
    third = recipe.build(recipe.assign(table, ["method.third.iterations=6"])).method.third
    assert third == IntraQ(iterations=6)  # a union has none by itself
    selecting = {"method": {"name": "selectq", "candidates": {"iterations": 7}}}
    assert recipe.build(selecting).method.candidates == ZeroQ(iterations=7)
    named = recipe.laid_over(table, {"method": {"second": {"name": "intraq"}}})
    assert recipe.build(named).method.second == IntraQ()  # nothing of ZeroQ's


def test_a_setting_that_is_none_where_it_is_not_by_default_is_told():
    @dataclass(frozen=True, kw_only=True)
    class Own(Noise):
        most: int | None = 5

    assert recipe.describe_part(Own(most=None))["most"] is None
    assert recipe.settings(Own, {"most": None}, "method") == Own(most=None)


def test_settings_that_no_record_can_hold_are_told():
    @dataclass(frozen=True, kw_only=True)
    class Own(Noise):
        where: object = None

    with pytest.raises(UserError, match=r"The setting 'where' of .*Own is .*Path.*, which no record can hold"):
        recipe.describe_part(Own(where=Path("x")))
