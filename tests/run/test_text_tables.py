"""Tables as text."""

import pytest

from pipelines.run.text_tables import aligned, estimate, markdown, number


def test_numbers():
    assert number(1.005, 1) == "1.0"
    assert number(0.979, 1, 100) == "97.9"
    assert number(None) == number(float("nan")) == "-"
    assert number(None, none="none") == "none"
    assert number(-2.0, 0) == "-2"


def test_estimates():
    found = {"value": 0.5, "low": 0.25, "high": 1.0}
    assert estimate(found, 1, 100) == "50.0 [25.0, 100.0]"
    assert estimate(found, 2, interval=False) == estimate({**found, "low": None, "high": None}, 2) == "0.50"
    assert estimate(None) == "-"
    assert estimate(None, form=lambda value, digits: "none" if value is None else "some") == "none"


def test_columns_are_aligned():
    assert aligned([("name", "n", "what"), ("longer name", 12, "x")], "<", ">5") == (
        "name             n  what\n"
        "longer name     12  x"
    )  # fmt: skip
    assert aligned([("a", ""), ("b", "x")], gap=" ") == "a\nb x"  # nothing after the last word
    assert aligned([("a", 123456)], "<3", ">2") == "a    123456"  # wider than its least width
    assert aligned([("a",), ("b", "c")]) == "a\nb  c"
    assert aligned([]) == ""


def test_markdown():
    rows = [("what", "a", "b"), ("x|y", 1, "two\nlines")]
    assert markdown(rows) == "| what | a | b |\n| --- | ---: | ---: |\n| x\\|y | 1 | two<br>lines |"
    assert markdown(rows[:1], "<") == "| what | a | b |\n| --- | --- | --- |"
    assert markdown(rows[:1], "<<>").endswith("| --- | --- | ---: |")
    with pytest.raises(ValueError):
        markdown([])
