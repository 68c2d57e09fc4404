"""Guards the expression language: its grammar, its functions, its limits, the words and columns of its errors, and
that it is never more than a small calculator.
"""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from search_spaces.evaluation import FUNCTIONS, ExpressionError
from search_spaces.expressions import MAX_LENGTH, MAX_NESTING, MAX_TOKENS, parse
from search_spaces.space import lookup_in

properties = settings(deadline=None, derandomize=True, max_examples=300)

GENOME = {
    "a": 7,
    "b": 3,
    "params": 30_000_000,
    "model": {"ffn": "moe", "d_model": 256, "n_heads": [2, 4, 8]},
    "data": {"mix": {"web": 0.75, "my corpus": 0.25}},
    "flag": True,
}


def value(text):
    return parse(text).evaluate(lookup_in(GENOME))


def refusal(text):
    """The column and the words with which an expression is refused."""
    with pytest.raises(ExpressionError) as caught:
        value(text)
    return caught.value.column, caught.value.message


# --- numbers, strings, names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        ("007", 7),
        ("1.5", 1.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        ("30M", 30_000_000),
        ("16GiB", 16 * 2**30),
        ("1.5K", 1500),
        ("true", True),
        ("false", False),
        ("'moe'", "moe"),
        ('"it\'s"', "it's"),
        ("[]", []),
        ("[1, 'a', [true]]", [1, "a", [True]]),
    ],
)
def test_a_constant_is_itself(text, expected):
    assert value(text) == expected
    assert type(value(text)) is type(expected)


def test_a_name_is_looked_up():
    assert value("model.d_model") == 256


def test_an_expression_knows_the_names_that_it_reads():
    assert parse("model.n_heads[0] * a + len(data.mix) - 30M").names == {
        ("model", "n_heads"),
        ("a",),
        ("data", "mix"),
    }


def test_an_expression_is_shown_as_it_was_written():
    assert str(parse(" a  + b ")) == " a  + b "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.n_heads[0]", 2),
        ("model.n_heads[b - 1]", 8),
        ("data.mix['web']", 0.75),
        ('data.mix["my corpus"]', 0.25),
        ("[[1, 2], [3, 4]][1][0]", 3),
    ],
)
def test_a_subscript_takes_one_item(text, expected):
    assert value(text) == expected


# --- precedence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 4 - 3", 3),
        ("100 / 10 / 5", 2.0),
        ("7 // 2 * 2", 6),
        ("-7 // 2", -4),
        ("-7 % 3", 2),
        ("2 ** 3 ** 2", 512),
        ("-2 ** 2", -4),
        ("(-2) ** 2", 4),
        ("2 ** -1", 0.5),
        ("2 * -3", -6),
        ("- - 5", 5),
        ("+5", 5),
        ("-[1, 2][0]", -1),
        ("-model.n_heads[1] ** 2", -16),
    ],
)
def test_arithmetic_binds_as_in_mathematics(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 1 == 2", True),
        ("1 < 2 == true", False),
        ("not 1 > 2", True),
        ("not not flag", True),
        ("not false and false", False),
        ("not (false and false)", True),
        ("true or true and false", True),
        ("(true or true) and false", False),
        ("2 in [1, 2] and 3 not in [1, 2]", True),
        ("not 2 in [1]", True),
    ],
)
def test_words_bind_more_loosely_than_signs(text, expected):
    assert value(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"), [("1 < 2 < 3", True), ("1 < 3 < 2", False), ("3 > 2 >= 2 == 2", True), ("1 < 2 > 3", False)]
)
def test_comparisons_chain(text, expected):
    assert value(text) is expected


@pytest.mark.parametrize("text", ["false and 1 / 0 > 0", "true or missing"])
def test_and_and_or_stop_as_soon_as_they_know(text):
    assert value(text) in (True, False)


# --- item by item -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.n_heads * 2", [4, 8, 16]),
        ("16 // model.n_heads", [8, 4, 2]),
        ("model.n_heads + [10, 20, 30]", [12, 24, 38]),
        ("-model.n_heads", [-2, -4, -8]),
        ("[[1, 2], [3]] * 2", [[2, 4], [6]]),
        ("model.n_heads % 4 == 0", [False, True, True]),
        ("2 < model.n_heads", [False, True, True]),
        ("['moe', 'relu2'] == model.ffn", [True, False]),
        ("[1, 2] != [1, 3]", [False, True]),
    ],
)
def test_arithmetic_and_comparison_go_item_by_item(text, expected):
    assert value(text) == expected


def test_lists_of_different_lengths_do_not_pair_up():
    assert refusal("[1, 2] + [1, 2, 3]") == (8, "'+' lists of 2 and 3 items do not pair up")


def test_strings_compare_with_strings():
    assert value("model.ffn == 'moe'") is True
    assert value("'adamw' < model.ffn") is True


def test_strings_do_not_compare_with_numbers():
    assert refusal("model.ffn < 1") == (11, "'<' needs numbers, got \"moe\"")


# --- functions --------------------------------------------------------------------------------------------------------


FUNCTION_CASES = [
    ("min(3, 1, 2)", 1),
    ("min(model.n_heads)", 2),
    ("max(3, a)", 7),
    ("max([1.5, 2])", 2),
    ("sum(model.n_heads)", 14),
    ("sum(1, 2)", 3),
    ("sum([])", 0),
    ("abs(-3)", 3),
    ("abs([-1, 2])", [1, 2]),
    ("round(2.5)", 3),
    ("round(-2.5)", -2),
    ("round(0.49)", 0),
    ("round([0.4, 0.6])", [0, 1]),
    ("floor(2.7)", 2),
    ("floor(-2.1)", -3),
    ("ceil(2.1)", 3),
    ("ceil([0.5, 2])", [1, 2]),
    ("round_to(8 / 3 * model.d_model, 64)", 704),
    ("round_to(96, 64)", 128),
    ("round_to(95, 64)", 64),
    ("round_to(160, 64)", 192),
    ("round_to(1, 64)", 64),
    ("round_to([100, 200], 64)", [128, 192]),
    ("len(model.n_heads)", 3),
    ("len(data.mix)", 2),
    ("len('moe')", 3),
    ("all(model.n_heads > 1)", True),
    ("all(model.n_heads > 2)", False),
    ("all([])", True),
    ("all(flag)", True),
    ("any(model.n_heads == 4)", True),
    ("any([])", False),
]


@pytest.mark.parametrize(("text", "expected"), FUNCTION_CASES)
def test_a_function_gives(text, expected):
    assert value(text) == expected
    assert type(value(text)) is type(expected)


def test_every_function_has_a_case_above():
    assert {text.split("(")[0] for text, _ in FUNCTION_CASES} == set(FUNCTIONS)


# --- errors: the words, and the column --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "expected a value, found the end"),
        ("   ", 1, "expected a value, found the end"),
        ("1 +", 4, "expected a value, found the end"),
        ("* 2", 1, "expected a value, found '*'"),
        ("1 2", 3, "unexpected '2'"),
        ("1)", 2, "unexpected ')'"),
        ("(1", 3, "expected ')', found the end"),
        ("[1, 2", 6, "expected ',', found the end"),
        ("[1 2]", 4, "expected ',', found '2'"),
        ("[1,]", 4, "expected a value, found ']'"),
        ("a[1", 4, "expected ']', found the end"),
        ("a not b", 7, "expected 'in', found 'b'"),
        ("a = 1", 3, "unexpected '='"),
        ("a  $ b", 4, "unexpected '$'"),
        ("'open", 1, "a string is not closed"),
        ("1_000", 1, "unexpected '1'"),
        ("30MB", 1, "unexpected '3'"),
        ("é", 1, "unexpected 'é'"),
        ("a .b", 3, "unexpected '.'"),
        ("mim(1)", 1, "unknown function 'mim'; did you mean 'min'?"),
        (
            "1 + exec(1)",
            5,
            "unknown function 'exec'; there are abs, all, any, ceil, floor, len, max, min, round, round_to, sum",
        ),
        ("round_to(1)", 1, "round_to() takes 2 arguments, got 1"),
        ("len(1, 2)", 1, "len() takes 1 argument, got 2"),
        ("max()", 1, "max() takes 1 or more arguments, got 0"),
    ],
)
def test_what_cannot_be_parsed_is_told_with_its_column(text, column, message):
    assert refusal(text) == (column, message)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("1 + missing", 5, "unknown name 'missing'"),
        ("1 / (a - 7)", 3, "division by zero"),
        ("1 // 0", 3, "division by zero"),
        ("1 % 0", 3, "division by zero"),
        ("0 ** -1", 3, "division by zero"),
        ("'a' + 1", 5, "'+' needs numbers, got \"a\""),
        ("1 in 2", 3, "'in' needs a list on its right, got 2"),
        ("'a' in 'abc'", 5, "'in' needs a list on its right, got \"abc\""),
        ("(-8) ** (1 / 3)", 6, "'**' would take a root of a negative number"),
        ("2 ** 10K", 3, "'**' gives a number that is too large"),
        ("9 ** 9 ** 9", 3, "'**' gives a number that is too large"),
        ("1e308 * 10", 7, "'*' gives a number that is too large"),
        ("1 and true", 1, "must be true or false, is 1"),
        ("true and 1", 10, "must be true or false, is 1"),
        ("not model.ffn", 5, 'must be true or false, is "moe"'),
        ("model.n_heads[3]", 14, "[2, 4, 8] has no item 3"),
        ("data.mix['wbe']", 1, "unknown name 'data.mix.wbe'"),
        ("a[0]", 2, "7 has no item 0"),
        ("min(1, [2])", 1, "min() needs numbers, got [2]"),
        ("sum(model.ffn)", 1, 'sum() needs numbers, got "moe"'),
        ("abs(model.ffn)", 1, 'abs() needs numbers, got "moe"'),
        ("len(3)", 1, "len() needs a list, got 3"),
        ("all([1])", 1, "all() needs truths, got [1]"),
        ("any(1)", 1, "any() needs truths, got 1"),
        ("round_to(1, 0)", 1, "round_to() the step must be positive, got 0"),
    ],
)
def test_what_has_no_value_is_told_with_its_column(text, column, message):
    assert refusal(text) == (column, message)


def test_a_long_value_is_cut_in_messages():
    _, message = refusal(f"[{', '.join(['1000'] * 50)}][99]")
    assert len(message) < 80
    assert message.endswith("... has no item 99")


def test_an_error_shows_the_text_with_a_caret():
    with pytest.raises(ExpressionError) as caught:
        value("1 / 0")
    assert str(caught.value) == "division by zero\n  1 / 0\n    ^"


def test_a_test_is_a_single_truth():
    assert parse("a > b").test(lookup_in(GENOME)) is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a + b", "must be true or false, is 10"),
        ("model.n_heads > 2", "must be true or false, is [false, true, true]; wrap it in all(...) or any(...)"),
    ],
)
def test_anything_but_a_truth_is_no_test(text, message):
    with pytest.raises(ExpressionError) as caught:
        parse(text).test(lookup_in(GENOME))
    assert caught.value.message == message


# --- limits -----------------------------------------------------------------------------------------------------------


def test_the_longest_expression_is_read():
    assert value("1".ljust(MAX_LENGTH)) == 1


def test_a_longer_one_is_not():
    assert refusal("1".ljust(MAX_LENGTH + 1)) == (1, f"longer than {MAX_LENGTH} characters")


def test_many_words_are_read():
    assert value(" + ".join("1" * 200)) == 200


def test_more_words_are_not():
    text = " + ".join("1" * 201)
    assert refusal(text) == (2 * MAX_TOKENS + 1, f"more than {MAX_TOKENS} words and signs")


def test_nesting_is_read():
    assert value("(" * 20 + "1" + ")" * 20) == 1


def test_deeper_nesting_is_not():
    assert refusal("-" * MAX_NESTING + "1") == (MAX_NESTING + 1, "nested too deeply")


@pytest.mark.parametrize("text", ["(" * 40 + "1" + ")" * 40, "not " * 40 + "true", " + ".join("1" * 200)])
def test_what_is_read_can_be_read_from_deep_inside_a_program(text):
    def inside(frames):
        return value(text) if frames == 0 else inside(frames - 1)

    assert inside(300) is not None


@pytest.mark.parametrize("text", ["1e400", "[1e308] * 10", "*".join(["10 ** 300"] * 20), "10 ** 400"])
def test_numbers_beyond_reason_are_refused(text):
    assert refusal(text)[1].endswith("number that is too large") or refusal(text)[1] == "number is too large"


def test_and_or_not_work_item_by_item():
    assert value("1 < model.n_heads < 8") is not None
    assert value("1 < [2, 9] < 4") == [True, False]
    assert value("not [true, false]") == [False, True]
    assert value("all([1, 2] in [1, 2, 3])")


def test_a_name_may_hold_any_text_in_brackets():
    assert parse('data.mix["a.b-c"]').names == {("data", "mix", "a.b-c")}


# --- nothing is ever evaluated as Python ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('file')",
        "eval('1')",
        "().__class__",
        "'a'.upper()",
        "[].append(1)",
        "lambda: 0",
        "[x for x in [1]]",
        "1 if true else 2",
        "(x := 1)",
        "f'{1}'",
        "a; b",
        "a\\b",
        "{1: 2}",
        "*[1]",
        "print",
        "True",
        "None",
        "a.__class__.__base__",
        "min.__self__",
        "'%s' % 1",
        "'a' * 1000",
        "[1] * [[1]] * 'a'",
        "a[0:1]",
        "a is b",
        "a & b",
        "~a",
        "@a",
        "9 ** 9 ** 9 ** 9",
        "a\x00",
    ],
)
def test_python_beyond_arithmetic_is_refused(text):
    with pytest.raises(ExpressionError):
        value(text)


@pytest.mark.parametrize(
    "name",
    [
        "__class__",
        "model.__class__",
        "model.d_model.__class__",
        "model.keys",
        "model.n_heads.append",
        "model.d_model.real",
    ],
)
def test_attributes_of_a_genome_are_unknown_names(name):
    genome = {"model": {"d_model": 256, "n_heads": [2, 4]}}
    with pytest.raises(ExpressionError, match=f"unknown name '{name}'"):
        parse(name).evaluate(lookup_in(genome))


# --- the same arithmetic as Python's ----------------------------------------------------------------------------------

atoms = st.integers(0, 99).map(str) | st.sampled_from(["a", "b"])
signs = st.sampled_from([" + ", " - ", " * ", " // ", " % ", " / "])


def _larger(inner):
    """Numbers from smaller numbers. Operands stand side by side without parentheses: precedence is what is tested."""
    return st.one_of(
        st.tuples(inner, signs, inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
        st.tuples(atoms, st.integers(0, 3)).map(lambda pair: f"-{pair[0]} ** {pair[1]}"),
        st.tuples(inner, st.integers(0, 3)).map(lambda pair: f"({pair[0]}) ** {pair[1]}"),
        st.tuples(inner, inner).map(lambda pair: f"min({pair[0]}, {pair[1]})"),
        st.tuples(inner, inner).map(lambda pair: f"max({pair[0]}, {pair[1]})"),
        inner.map("abs({})".format),
    )


def _combined(inner):
    """Truths from smaller truths."""
    return st.one_of(
        st.tuples(inner, st.sampled_from([" and ", " or "]), inner).map("".join),
        inner.map("not {}".format),
        inner.map("({})".format),
    )


numbers = st.recursive(atoms, _larger, max_leaves=8)
relations = st.sampled_from([" < ", " <= ", " > ", " >= ", " == ", " != "])
comparisons = st.tuples(numbers, relations, numbers).map("".join)
chains = st.tuples(comparisons, relations, numbers).map("".join)
truths = st.recursive(comparisons | chains | st.sampled_from(["true", "false"]), _combined, max_leaves=6)

PYTHON = {"__builtins__": {}, "abs": abs, "min": min, "max": max, "true": True, "false": False, "a": 7, "b": 3}


def agree(text):
    """Whether an expression has the value and the type that Python gives it, or no value as in Python."""
    try:
        expected = eval(text, PYTHON)
    except ZeroDivisionError:
        return refusal(text)[1] == "division by zero"
    except OverflowError:
        assume(False)
    assume(abs(expected) < 2**900 and math.isfinite(expected))
    return (type(value(text)), value(text)) == (type(expected), expected)


@properties
@given(numbers)
def test_arithmetic_agrees_with_python(text):
    assert agree(text)


@properties
@given(truths)
def test_comparison_and_logic_agree_with_python(text):
    assert agree(text)


@properties
@given(st.text("ab12.'\"()[],+-*/%<>=! notndrim", max_size=30))
def test_any_text_has_a_value_or_an_error_of_our_own(text):
    try:
        value(text)
    except ExpressionError as error:
        assert 1 <= error.column <= len(text) + 1
