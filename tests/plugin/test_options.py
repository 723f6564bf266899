"""The options of a class, read from its signature and docstring."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import pytest
import torch

from equipoise.options import Bounds, options, read_options, references, summary


class Base:
    """A base.

    Args:
        momentum: Of the base. (0 <= x < 1)
        shared: The base's words.
    """

    def __init__(self, params, momentum: float = 0.9, shared: int = 1):
        pass


class Plugin(Base):
    """Does one thing,
    in two lines.

    More about it.

    Args:
        factors: Part → factor. (each >= 0)
        rate: How fast, a sentence that goes on
            over two lines. (> 0)
        pair: Two decays. (each 0 <= x < 1)
        mode: Which way.
        limit: Optional. (>= 1)
        shared: The subclass's words.

    References:
        First et al., A Title
            on two lines, 2024.
        Second, Another.
    """

    def __init__(
        self,
        params,
        rate: "float | torch.Tensor",  # text, as under `from __future__ import annotations`
        pair: tuple[float, float] = (0.9, 0.99),
        *,
        mode: Literal["absolute", "relative"] | None = "absolute",
        limit: int | None = None,
        flag: bool = False,
        untyped=0.5,
        factors: dict[str, float] | None = None,
        extra: Mapping = MappingProxyType({}),
        **rest,
    ):
        super().__init__(params, **rest)


BY_NAME = {option.name: option for option in options(Plugin)}


def test_names_come_in_order_and_kwargs_lead_to_the_base():
    assert list(BY_NAME) == [
        *("rate", "pair", "mode", "limit", "flag", "untyped", "factors", "extra"),  # its own
        *("momentum", "shared"),
    ]


@pytest.mark.parametrize(
    ("name", "type_", "default", "bounds", "help_"),
    [
        ("rate", "a number", None, "> 0", "How fast, a sentence that goes on over two lines."),
        ("pair", "[a number, a number]", (0.9, 0.99), "each 0 <= x < 1", "Two decays."),
        ("mode", "one of 'absolute', 'relative' or none", "absolute", "", "Which way."),
        ("limit", "a whole number or none", None, ">= 1", "Optional."),
        ("flag", "true or false", False, "", ""),
        ("untyped", "a number", 0.5, "", ""),
        ("factors", "{name: a number, …} or none", None, "each >= 0", "Part → factor."),
        ("extra", "{name: anything, …}", {}, "", ""),
        ("momentum", "a number", 0.9, "0 <= x < 1", "Of the base."),
        ("shared", "a whole number", 1, "", "The subclass's words."),
    ],
)
def test_an_option_has_type_default_bounds_and_help(name, type_, default, bounds, help_):
    option = BY_NAME[name]
    assert (option.type, option.default, str(option.bounds or ""), option.help) == (type_, default, bounds, help_)
    assert option.required == (name == "rate")


def test_a_pipeline_without_a_docstring_is_summed_up_by_its_title():
    own = {"title": "Learning a curve", "__doc__": "Its own words.\n\nMore."}
    assert summary(type("Curve", (), {"title": "Learning a curve"})) == "Learning a curve"
    assert summary(type("Curve", (), own)) == "Its own words."


def test_summary_and_references():
    assert summary(Plugin) == "Does one thing, in two lines."
    assert references(Plugin) == ["First et al., A Title on two lines, 2024.", "Second, Another."]
    assert references(Base) == []
    assert references(type("P", (), {"__doc__": "One line.\n\n    Paper: A title,\n        2024.\n"})) == [
        "A title, 2024."
    ]


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("rate", "1e-4", 1e-4),  # YAML 1.1 reads 1e-4 as text
        ("rate", 1, 1.0),
        ("pair", [0.5, "0.25"], (0.5, 0.25)),
        ("mode", "relative", "relative"),
        ("mode", None, None),
        ("limit", "none", None),
        ("limit", 3.0, 3),
        ("flag", "off", False),
        ("factors", {"audio": "1e-1", "visual": 2}, {"audio": 0.1, "visual": 2.0}),
        ("factors", "none", None),
        ("factors", {}, {}),
        ("extra", {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_are_converted(name, given, value):
    converted = read_options(Plugin, {"rate": 1.0} | {name: given})[0][name]
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "problem"),
    [
        ("rate", -1, "rate: must be a number > 0, got -1."),
        ("rate", 0, "rate: must be a number > 0, got 0."),
        ("rate", True, "rate: must be a number > 0, got True."),
        ("rate", "nan", "rate: must be a number > 0, got 'nan'."),
        ("rate", float("inf"), "rate: must be a number > 0, got inf."),
        ("rate", 10**400, f"rate: must be a number > 0, got {10**400}."),
        ("rate", None, "rate: must be a number > 0, got None."),
        ("pair", [0.5, 1], "pair: must be [a number, a number], each 0 <= x < 1, got [0.5, 1]."),
        ("pair", [0.5], "pair: must be [a number, a number], each 0 <= x < 1, got [0.5]."),
        (
            "mode",
            "relativ",
            "mode: must be one of 'absolute', 'relative' or none, got 'relativ'. Did you mean 'relative'?",
        ),
        ("limit", 1.5, "limit: must be a whole number >= 1 or none, got 1.5."),
        ("flag", 1, "flag: must be true or false, got 1."),
        ("factors", 3, "factors: must be {name: a number, …}, each >= 0 or none, got 3."),
        ("factors", {"a": -1}, "factors: must be {name: a number, …}, each >= 0 or none, got {'a': -1}."),
        ("factors", {"a": "x"}, "factors: must be {name: a number, …}, each >= 0 or none, got {'a': 'x'}."),
        ("factors", {"a": True}, "factors: must be {name: a number, …}, each >= 0 or none, got {'a': True}."),
        ("factors", {1: 2}, "factors: must be {name: a number, …}, each >= 0 or none, got {1: 2}."),
        ("extra", [1], "extra: must be {name: anything, …}, got [1]."),
        ("momentum", 1, "momentum: must be a number with 0 <= x < 1, got 1."),
    ],
)
def test_what_does_not_fit_is_a_sentence(name, given, problem):
    assert read_options(Plugin, {"rate": 1.0} | {name: given})[1] == [problem]


def test_all_problems_at_once():
    problems = read_options(Plugin, {"momentun": 0.9, "flag": "maybe"})[1]
    assert problems[0].startswith("momentun: no such option. Did you mean 'momentum'? Plugin has: rate, pair, ")
    assert problems[1:] == ["flag: must be true or false, got 'maybe'.", "rate: missing; must be a number."]


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("> 0", [1e-30, 5], [0, -1]),
        (">= 0", [0], [-1e-9]),
        ("x <= 1", [1], [1.01]),
        ("0 < x < 1e-3", [5e-4], [0, 1e-3]),
        ("-1 <= x <= 1", [-1, 1], [-1.1, 1.1]),
    ],
)
def test_bounds_contain_what_they_say(text, inside, outside):
    bounds = Bounds.parse(text)
    assert bounds and all(map(bounds.contain, inside)) and not any(map(bounds.contain, outside))


def test_a_parenthesis_that_is_no_bound_stays_help():
    assert Bounds.parse("as in the paper") is None
    assert Bounds.parse("a < b < c") is None


def test_torch_docstrings_are_read_too():
    found = {option.name: option for option in options(torch.optim.AdamW)}
    assert found["lr"].type == "a number" and found["lr"].default == 1e-3
    assert found["eps"].help == "term added to the denominator to improve numerical stability"
    assert found["betas"].type == "[a number, a number]"
    assert "params" not in found
    assert references(torch.optim.AdamW)[0].endswith("https://arxiv.org/abs/1711.05101")


def test_every_torch_optimizer_can_be_described():
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    classes.remove(torch.optim.Optimizer)
    assert len(classes) >= 13
    for cls in classes:
        assert options(cls)[0].name == "lr" and options(cls)[0].help, cls
        defaults = {option.name: option.default for option in options(cls) if not option.required}
        assert read_options(cls, defaults)[1] == [], cls
