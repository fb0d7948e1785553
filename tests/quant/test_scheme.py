from __future__ import annotations

import dataclasses

import pytest

from mirageq.errors import UserError
from mirageq.quant import Scheme, parse_bits


def test_bits_have_a_short_name_and_back():
    assert Scheme(weight_bits=3, activation_bits=8).bits == "w3a8"
    assert parse_bits("w3a8") == parse_bits(" W3A8 ") == (3, 8)


@pytest.mark.parametrize("text", ["4", "w4", "a4w4", "w4a4x", "", "w-4a4"])
def test_malformed_bits(text):
    with pytest.raises(UserError, match=rf"written like w4a4.*got '{text}'"):
        parse_bits(text)


@pytest.mark.parametrize(("text", "what"), [("w1a4", "weight bits .* got 1"), ("w4a9", "activation bits .* got 9")])
def test_bits_out_of_range(text, what):
    with pytest.raises(UserError, match=f"{what}"):
        parse_bits(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be a whole number from 2 to 8; got 1"),
        ({"activation_bits": 16}, "activation_bits must be a whole number from 2 to 8; got 16"),
        ({"activation_bits": None}, "activation_bits .* got None"),
        ({"first_last_bits": 9}, "first_last_bits .* got 9"),
        ({"residual_bits": 0}, "residual_bits .* got 0"),
        ({"first_output_bits": 9}, "first_output_bits .* got 9"),
        ({"weight_bits": 4.0}, "weight_bits .* got 4.0"),
        ({"placement": "deplyo"}, "Unknown placement 'deplyo'; did you mean 'deploy'"),
        ({"weight_range": "ema"}, "Unknown weight_range 'ema'"),
        ({"activation_range": "minmac"}, "did you mean 'minmax'"),
        ({"percentile": 40}, "percentile must be above 50 and at most 100; got 40"),
        ({"percentile": "most"}, "percentile .* got 'most'"),
        ({"clip_gradient": "yes"}, "clip_gradient must be one of true or false; got 'yes'"),
        ({"weight_symmetric": 1}, "weight_symmetric must be"),
    ],
)
def test_wrong_settings_say_what_was_got(settings, message):
    with pytest.raises(UserError, match=message):
        Scheme(**settings)


def test_symmetry_is_the_placements_habit_unless_given():
    assert not Scheme().symmetric_weights
    assert Scheme(placement="deploy").symmetric_weights
    assert not Scheme(placement="deploy", weight_symmetric=False).symmetric_weights


def test_a_scheme_is_plain_values():
    scheme = Scheme(weight_bits=2, first_last_bits=8)
    assert Scheme(**dataclasses.asdict(scheme)) == scheme
