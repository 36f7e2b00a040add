"""`key=value` changes one key: a TOML value, or a bare word for text."""

import pytest

from meshwright.launcher.runfile.overrides import apply_overrides, parse_value


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "200", 200),
        ("learning_rate.peak", "3e-4", 3e-4),
        ("train.compile", "true", True),
        ("optimizer.betas", "[0.9, 0.99]", [0.9, 0.99]),
        ("run.name", "second-try", "second-try"),
        ("run.name", '"quoted"', "quoted"),
        # What TOML reads as something else stays text where the key holds text.
        ("run.name", "7", "7"),
        ("run.name", "2026-01-01", "2026-01-01"),
        ("run.name", "true", "true"),
        ("data.store", "/a/b=c", "/a/b=c"),
        ("init.from", "1", "1"),
        ("data.store", "", ""),
        ("model.pattern", "[*-]*-", "[*-]*-"),
        ("model.pattern", "[M]", "[M]"),
        ("run.folder", "{a}/[b]", "{a}/[b]"),
    ],
)
def test_a_value_is_toml_or_a_bare_word(key: str, text: str, value: object) -> None:
    assert parse_value(key, text) == value


def test_a_list_that_is_not_closed_is_no_bare_word() -> None:
    _, problems = apply_overrides({}, ["optimizer.betas=[0.9, 0.99"])
    assert len(problems) == 1
    assert problems[0].startswith("optimizer.betas = [0.9, 0.99: is no TOML value")


def test_text_whose_quote_is_not_closed_is_no_bare_word() -> None:
    _, problems = apply_overrides({}, ['model.pattern="[*-]'])
    assert len(problems) == 1
    assert problems[0].startswith('model.pattern = "[*-]: is no TOML value')


def test_the_last_of_two_wins_and_the_file_stays_as_it_was() -> None:
    tables = {"train": {"steps": 1}}
    changed, problems = apply_overrides(tables, ["train.steps=2", "train.steps=3", "zero.stage=1", "model.moe.top_k=4"])
    assert problems == []
    assert changed == {"train": {"steps": 3}, "zero": {"stage": 1}, "model": {"moe": {"top_k": 4}}}
    assert tables == {"train": {"steps": 1}}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps", "train.steps: an override is written key=value, such as train.steps=100"),
        ("=3", "=3: an override is written key=value, such as train.steps=100"),
        ("train.=3", "train.=3: an override is written key=value, such as train.steps=100"),
        ("steps=3", "steps=3: the key of an override is written with its table; did you mean train.steps=3?"),
        ("lr=3", "lr=3: the key of an override is written with its table; did you mean learning_rate.peak=3?"),
        (
            "zero=3",
            "zero=3: zero is a table; its keys are set one by one, such as zero.stage=...; [zero] has: stage",
        ),
        ("train.steps=1\n[x]", "train.steps = 1\n[x]: must be one line; give each key by itself"),
        ("x." * 3000 + "y=1", "x." * 38 + "x...: the key has 3,001 names; at most 8 would fit"),
        (
            f"train.steps={'[' * 3000}",
            f"train.steps = {'[' * 77}...: has lists or tables nested too deep; "
            "at most 64 within one another would fit",
        ),
        (f"train.steps={'9' * 5000}", f"train.steps = {'9' * 77}...: has a number of more than 4,300 digits"),
        ("train.steps.x=3", "train.steps.x: train.steps = 1 is no table, it has no keys"),
    ],
)
def test_what_is_no_override_is_told(override: str, line: str) -> None:
    _, problems = apply_overrides({"train": {"steps": 1}}, [override])
    assert problems == [line]
