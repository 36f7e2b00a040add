"""A pattern of letters becomes layers; what is no pattern names the character at fault."""

import pytest

from meshwright.model.pattern import LayerKinds, kinds_in, layers_of, parse_pattern

ATTENTION_MLP = LayerKinds("attention", "mlp")
ATTENTION_MOE = LayerKinds("attention", "moe")
BARE = LayerKinds("attention", None)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*-", [ATTENTION_MLP]),
        ("*E", [ATTENTION_MOE]),
        ("*", [BARE]),
        ("3**-", [BARE, BARE, BARE, ATTENTION_MLP]),
        ("*-E", [ATTENTION_MLP, LayerKinds(None, "moe")]),
        ("-*", [LayerKinds(None, "mlp"), LayerKinds("attention", None)]),
        ("2(*-)3(*E)", [ATTENTION_MLP] * 2 + [ATTENTION_MOE] * 3),
        ("2(*2(*E))", [BARE, ATTENTION_MOE, ATTENTION_MOE] * 2),
        # The repeats are written out first: the last attention takes the feed-forward.
        ("2(*)-", [LayerKinds("attention", None), ATTENTION_MLP]),
        ("12(*-)", [ATTENTION_MLP] * 12),
        ("2(*-[*E])", [ATTENTION_MLP, ATTENTION_MOE._replace(is_routed=True)] * 2),
    ],
)
def test_a_pattern_says_the_kinds_of_each_layer(pattern: str, expected: list[LayerKinds]) -> None:
    assert list(parse_pattern(pattern)) == expected


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("", "it is empty"),
        ("*x", "character 2: 'x' is none of the letters"),
        ("2(*-", "a group is not closed"),
        ("*-)", "character 3: this \\) closes no group"),
        ("2()", "character 3: the group is empty"),
        ("*-2", "the number 2 at the end stands before nothing"),
        ("(*-2)", r"^character 5: the number 2 stands before this \), and must stand before a letter or a \($"),
        ("*2[*-]", r"^character 3: the number 2 stands before this \[, and must stand before a letter or a \($"),
        ("[1]", r"^character 3: the number 1 stands before this \], and must stand before a letter or a \($"),
        ("0(*-)", "^character 2: the number before it is 0, and must be 1 or more$"),
        ("[0]", "^character 3: the number before it is 0, and must be 1 or more$"),
        ("99999999(*-)", "repeats to more than"),
        ("1000(1000(1000(1000(*))))", "repeats to more than"),
        ("[*-*-]", "holds 2 layers"),
        ("[]", "holds 0 layers"),
        ("[*-", "] is missing"),
        ("*-]", "a ] closes no"),
        ("[[*-]]", "stands within another"),
    ],
)
def test_what_is_no_pattern_is_named(pattern: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_pattern(pattern)


def test_the_period_is_repeated_up_to_the_number_of_layers() -> None:
    assert layers_of("*-*E", 6) == (ATTENTION_MLP, ATTENTION_MOE) * 3


def test_layers_are_put_in_by_number() -> None:
    routed = ATTENTION_MLP._replace(is_routed=True)
    found = layers_of("*E @0-1,4 *- @5 [*-]", 6)
    assert found == (ATTENTION_MLP, ATTENTION_MLP, ATTENTION_MOE, ATTENTION_MOE, ATTENTION_MLP, routed)
    assert kinds_in("*E @3 [*-]") == {ATTENTION_MOE, routed}


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("*E @ *-", "must be numbers of layers"),
        ("*E @0,x *-", "must be numbers of layers"),
        ("*E @0-999999 *-", "must be numbers of layers"),
        ("*E @3-1 *-", "@3-1: 3-1 counts down and places nothing; 1-3 would count up"),
        ("*E @0 *-*-", "must be the letters of one layer"),
        ("*E @0", "it is empty"),
        ("*E @0-2 *- @2 *", "layer 2 is placed twice"),
        ("*E @6 *-", "layer 6 of .* is none of 6 layers, 0 to 5"),
    ],
)
def test_a_place_that_is_none_is_named(pattern: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        layers_of(pattern, 6)


def test_a_period_that_does_not_divide_the_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers = 5 does not divide by the 2 layers"):
        layers_of("*-*E", 5)
