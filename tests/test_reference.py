from __future__ import annotations

import pytest

from mirageq import cli, recipe, reference
from mirageq.methods import METHODS
from mirageq.quant import Scheme
from mirageq.testing import CARD_HEADINGS
from mirageq.tuning import TUNERS


@pytest.mark.parametrize("kind", [*METHODS.values(), *TUNERS.values(), Scheme], ids=lambda kind: kind.__name__)
def test_every_setting_says_what_it_means(kind):
    assert [name for name, meaning in reference.meanings(kind).items() if not meaning] == []


@pytest.mark.parametrize("kind", TUNERS.values(), ids=lambda kind: kind.__name__)
def test_tuners_have_cards_as_methods_have(kind):
    assert [heading for heading in CARD_HEADINGS if heading.split()[0] not in reference.card(kind)] == []


def test_settings_are_told_with_type_default_and_meaning(capsys):
    assert cli.main(["methods", "genie"]) == 0
    told = capsys.readouterr().out
    assert "Differences from the official method" in told
    assert "schedule: 'plateau' or 'cosine' = 'plateau'\n" in told
    assert "clamp: bool = False\n      keep pixels in the range" in told
    assert cli.main(["tuners", "reconstruct"]) == 0
    assert "drop: float = 0.5\n      probability" in capsys.readouterr().out
    assert cli.main(["scheme"]) == 0
    assert "residual_bits: int | None = None" in capsys.readouterr().out


def test_lists_tell_an_idea_of_each(capsys):
    for command, known in (("methods", METHODS), ("tuners", TUNERS), ("recipes", recipe.shipped())):
        assert cli.main([command]) == 0
        told = capsys.readouterr().out
        assert all(name in told for name in known)
        assert f"mirageq {command} NAME" in told


def test_a_recipe_is_told_as_settings_that_build_it_again(capsys):
    assert cli.main(["recipes", "best-imagenet"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("best-cifar10 for networks that remember 224 x 224 images")
    lines = [line.strip() for line in told.splitlines() if line.startswith("  ")]
    plain = [line for line in lines if "=[" not in line]
    assert recipe.build(recipe.assign({}, plain)) == recipe.build(recipe.read("best-imagenet"))


@pytest.mark.parametrize("command", ["methods", "tuners", "recipes"])
def test_an_unknown_name_is_said(command, capsys):
    assert cli.main([command, "nothing"]) == 2
    assert f"There is no {command[:-1]} 'nothing'" in capsys.readouterr().err


def test_a_method_may_lie_in_the_working_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "beside_me.py").write_text(
        '"""Mine: nothing."""\n\nfrom dataclasses import dataclass\n\n'
        "@dataclass(frozen=True, kw_only=True)\nclass Mine:\n"
        "    def synthesize(self, teacher, count, *, seed=0, journal=None): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["methods", "beside_me:Mine"]) == 0
    assert "Mine: nothing." in capsys.readouterr().out
