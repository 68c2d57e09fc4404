"""Guards the suffixes: what `32M` tokens and `16GiB` of memory mean, and how such numbers are written back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.quantities import SUFFIXES, format_bytes, format_count, parse_quantity

properties = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2K", 2_000),
        ("32M", 32_000_000),
        ("7B", 7_000_000_000),
        ("1T", 10**12),
        ("3KiB", 3 * 1024),
        ("5MiB", 5 * 1024**2),
        ("16GiB", 16 * 1024**3),
        ("2TiB", 2 * 1024**4),
        ("1.5M", 1_500_000),
        ("-5K", -5_000),
        ("+5K", 5_000),
        ("0K", 0),
    ],
)
def test_a_suffix_multiplies(text, value):
    assert parse_quantity(text) == value


@properties
@given(number=st.integers(0, 10**5), suffix=st.sampled_from(sorted(SUFFIXES)))
def test_a_whole_number_with_any_suffix_is_an_exact_int(number, suffix):
    quantity = parse_quantity(f"{number}{suffix}")
    assert isinstance(quantity, int)
    assert quantity == number * SUFFIXES[suffix]


def test_a_fraction_that_comes_out_whole_is_an_int():
    assert isinstance(parse_quantity("1.5M"), int)


def test_a_fraction_that_does_not_stays_a_float():
    assert parse_quantity("0.0005K") == 0.5


@pytest.mark.parametrize(
    "text",
    ["", "M", "30", "30m", "30 M", "30MB", "30Mi", "30KB", "1e3K", "1_000K", ".5M", "5.M", " 30M", "30M\n", "٣K"],
)
def test_anything_else_is_no_quantity(text):
    assert parse_quantity(text) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1K"),
        (1_234_567, "1.23M"),
        (999_499, "999K"),
        (999_500, "1M"),
        (30_000_000, "30M"),
        (6.5e9, "6.5B"),
        (2e12, "2T"),
        (-4_000_000, "-4M"),
        (0.25, "0.25"),
    ],
)
def test_a_count_is_written_with_three_digits(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        (16 * 1024**3, "16GiB"),
        (2 * 1024**4, "2TiB"),
        (-1536, "-1.5KiB"),
    ],
)
def test_bytes_are_written_with_three_digits(value, text):
    assert format_bytes(value) == text
