"""Guards the words: for each rule of a space one file that breaks it, with the exact place, rule and way out."""

import json

import pytest

from search_spaces import Space, SpaceError
from search_spaces.errors import Problem, dotted, nearest
from search_spaces.yaml_source import parse_yaml


def problems(tree, constraints=(), **options):
    """Every problem of a space as (path, rule, way out)."""
    with pytest.raises(SpaceError) as caught:
        Space.from_dict(tree, constraints, **options)
    return [(dotted(problem.path), problem.rule, problem.help) for problem in caught.value.problems]


CASES = [
    # --- any gene
    (
        {"x": {"int": [1, 9], "float": [0, 1]}},
        ("x", "has 2 kinds (float, int), a gene has exactly one", None),
    ),
    (
        {"x": {"float": [0, 1], "setp": 0.1}},
        ("x.setp", "unknown option of a float gene 'setp'", "did you mean 'step'?"),
    ),
    (
        {"x": {"choice": [1, 2], "low": 0}},
        (
            "x.low",
            "unknown option of a choice gene 'low'",
            "known here: baseline, default, ordered, transfer, when",
        ),
    ),
    (
        {"x": {"float": [0, 1], "log": 1}},
        ("x.log", "must be true or false, is 1", None),
    ),
    (
        {"x": {"choice": [1, 2], "ordered": "yes"}},
        ("x.ordered", 'must be true or false, is "yes"', None),
    ),
    (
        {"x": {"int": [1, 9], "baseline": 10}},
        ("x.baseline", "must lie in [1, 9], is 10", None),
    ),
    (
        {"x": {"int": [1, 9], "transfer": "wdith"}},
        ("x.transfer", "unknown transfer class 'wdith'", "did you mean 'width'?"),
    ),
    (
        {"x": {"int": [1, 9], "when": "true"}},
        (
            "x",
            "has `when` but no `default`",
            "add `default:`, the value while the gene is inactive",
        ),
    ),
    (
        {"x": {"int": [1, 9], "default": 3}},
        ("x.default", "has `default` but no `when`", "`baseline:` names the starting value"),
    ),
    # --- float and int
    (
        {"x": {"float": 3}},
        ("x.float", "must be [low, high], is 3", None),
    ),
    (
        {"x": {"int": [1, 2, 3]}},
        ("x.int", "must be [low, high], is [1, 2, 3]", None),
    ),
    (
        {"x": {"float": [0, "big"]}},
        ("x.float[1]", 'must be a number, is "big"', None),
    ),
    (
        {"x": {"int": [True, 3]}},
        ("x.int[0]", "must be a whole number, is true", None),
    ),
    (
        {"x": {"int": [1.5, 3]}},
        ("x.int[0]", "must be a whole number, is 1.5", None),
    ),
    (
        {"x": {"float": [3, 1]}},
        ("x.float", "low <= high must hold, got [3, 1]", "did you mean [1, 3]?"),
    ),
    (
        {"x": {"float": [0, 1], "log": True}},
        ("x.float[0]", "low > 0 must hold on a logarithmic scale, got 0", None),
    ),
    (
        {"x": {"int": [1, 9], "step": 0}},
        ("x.step", "step > 0 must hold, got 0", None),
    ),
    (
        {"x": {"float": [0, 1], "step": 2.5}},
        ("x.step", "step <= high - low = 1 must hold, got 2.5", None),
    ),
    (
        {"x": {"int": [1, 9], "step": 0.5}},
        ("x.step", "must be a whole number, is 0.5", None),
    ),
    (
        {"x": {"float": [0, 1], "step": "small"}},
        ("x.step", 'must be a number, is "small"', None),
    ),
    # --- choice
    (
        {"x": {"choice": "adamw"}},
        ("x.choice", 'must be a list of at least one item, is "adamw"', None),
    ),
    (
        {"x": {"choice": []}},
        ("x.choice", "must be a list of at least one item, is []", None),
    ),
    (
        {"x": {"choice": list(range(10_001))}},
        ("x.choice", "has 10001 items, 10000 are the most", "use int or float"),
    ),
    (
        {"x": {"choice": [{"a": 1, "b": 2}, 3, {"b": 2, "a": 1}]}},
        ("x.choice[2]", 'item {"a":1,"b":2} is given twice', None),
    ),
    (
        {"x": {"choice": ["a", "b"], "baseline": "c"}},
        ("x.baseline", 'must be one of ["a", "b"], is "c"', None),
    ),
    # --- simplex
    (
        {"x": {"simplex": 3}},
        ("x.simplex", "must be a mapping of names to weights, is 3", None),
    ),
    (
        {"x": {"simplex": ["a", "a"]}},
        ("x.simplex", 'must be a mapping of names to weights, is ["a", "a"]', None),
    ),
    (
        {"x": {"simplex": {"a": "much"}}},
        ("x.simplex.a", 'must be a number, is "much"', None),
    ),
    (
        {"x": {"simplex": {"a": 1, "b": -1}}},
        ("x.simplex", "weights must not be negative, and one must be positive", None),
    ),
    (
        {"x": {"simplex": {"a": 0, "b": 0}}},
        ("x.simplex", "weights must not be negative, and one must be positive", None),
    ),
    (
        {"x": {"simplex": ["a", "b"], "floor": {"c": 0.1}}},
        ("x.floor.c", "unknown part of the simplex 'c'", "known here: a, b"),
    ),
    (
        {"x": {"simplex": ["a", "b"], "floor": -0.1}},
        ("x.floor", "must lie in [0, 1], is -0.1", None),
    ),
    (
        {"x": {"simplex": ["a", "b"], "ceiling": {"a": 1.5}}},
        ("x.ceiling", 'must lie in [0, 1], is {"a": 1.5}', None),
    ),
    (
        {"x": {"simplex": ["a", "b"], "floor": "low"}},
        ("x.floor", 'must be a number, is "low"', None),
    ),
    (
        {"x": {"simplex": ["a", "b"], "floor": 0.6}},
        (
            "x.simplex",
            "no weights fit: floors sum to 1.2, ceilings to 2",
            "floors may sum to at most 1, ceilings to at least 1, floor <= ceiling each",
        ),
    ),
    (
        {"x": {"simplex": ["a", "b"], "ceiling": 0.4}},
        (
            "x.simplex",
            "no weights fit: floors sum to 0, ceilings to 0.8",
            "floors may sum to at most 1, ceilings to at least 1, floor <= ceiling each",
        ),
    ),
    (
        {"x": {"simplex": {"a": 0.5, "b": 0.5}, "floor": {"a": 0.4}, "ceiling": {"a": 0.3}}},
        (
            "x.simplex",
            "no weights fit: floors sum to 0.4, ceilings to 1.3",
            "floors may sum to at most 1, ceilings to at least 1, floor <= ceiling each",
        ),
    ),
    (
        {"x": {"simplex": {"a": 0.98, "b": 0.02}, "floor": {"b": 0.1}}},
        ("x.simplex.b", "weight 0.02 of b is outside its bounds [0.1, 1]", "the weights given are the baseline"),
    ),
    # --- list
    (
        {"x": {"list": [1, 2], "length": 3}},
        ("x.list", "must be a gene that is not itself a list", "list: {choice: [2, 4, 8]}"),
    ),
    (
        {"x": {"list": {"list": {"int": [1, 2]}, "length": 2}, "length": 3}},
        ("x.list", "must be a gene that is not itself a list", "list: {choice: [2, 4, 8]}"),
    ),
    (
        {"x": {"list": {"int": [1, 9], "transfer": "shape"}, "length": 3}},
        ("x.list.transfer", "`transfer` belongs to the list, not to its items", None),
    ),
    (
        {"x": {"list": {"int": [9, 1]}, "length": 3}},
        ("x.list.int", "low <= high must hold, got [9, 1]", "did you mean [1, 9]?"),
    ),
    (
        {"x": {"list": {"int": [1, 9]}}},
        ("x", "a list needs `length`: a number, or the path of an int gene", None),
    ),
    (
        {"x": {"list": {"int": [1, 9]}, "length": 0}},
        ("x.length", "must lie in [1, 1024], is 0", None),
    ),
    (
        {"x": {"list": {"int": [1, 9]}, "length": 1025}},
        ("x.length", "must lie in [1, 1024], is 1025", None),
    ),
    (
        {"x": {"list": {"int": [1, 9]}, "length": "n"}, "n": {"int": [1, 2000]}},
        ("x.length", "must lie in [1, 1024], can be 1 to 2000", None),
    ),
    (
        {"x": {"list": {"int": [1, 9]}, "length": "n"}, "n": {"float": [1, 2]}, "m": {"int": [1, 2]}},
        ("x.length", "must be a number or the path of an int gene, is `n`", "int genes here: m"),
    ),
    (
        {"x": {"list": {"int": [1, 9]}, "length": "n"}, "n": "four"},
        ("x.length", "must be a number or the path of an int gene, is `n`", None),
    ),
    (
        {"x": {"list": {"int": [1, 9]}, "length": 3, "baseline": 10}},
        ("x.baseline", "must lie in [1, 9], is 10", None),
    ),
    (
        {"x": {"list": {"int": [1, 9]}, "length": 3, "baseline": [1, 10, 2]}},
        ("x.baseline[1]", "must lie in [1, 9], is 10", None),
    ),
    # --- expressions
    (
        {"x": {"expr": "1 +"}},
        ("x.expr", "cannot be read: expected a value, found the end (column 4 of `1 +`)", None),
    ),
    (
        {"x": {"expr": [1]}},
        ("x.expr", "must be an expression, is [1]", None),
    ),
    (
        {"x": {"expr": "1", "step": 2}},
        ("x.step", "unknown option of a derived value 'step'", "known here: expr"),
    ),
    (
        {"x": {"int": [1, 9], "when": "y ==", "default": 0}, "y": 1},
        ("x.when", "cannot be read: expected a value, found the end (column 5 of `y ==`)", None),
    ),
    (
        {"x": {"int": [1, 9], "when": "widht > 1", "default": 0}, "width": 1},
        ("x", "unknown name 'widht'", "did you mean 'width'?"),
    ),
    (
        {"x": {"expr": "zzz"}, "width": 1},
        ("x", "unknown name 'zzz'", "known here: width, x"),
    ),
    (
        {"x": {"expr": "y"}, "y": {"expr": "z"}, "z": {"int": [1, 2], "when": "x > 1", "default": 0}},
        ("x", "depends on itself, by way of y, z, x", None),
    ),
    # --- the tree
    (
        {"x": [1, {"int": [1, 2]}]},
        ("x[1]", "a gene cannot stand inside a list", "use {list: GENE, length: N}"),
    ),
    (
        {"x": [{"expr": "1"}]},
        ("x[0]", "a gene cannot stand inside a list", "use {list: GENE, length: N}"),
    ),
    (
        {"x": float("nan")},
        ("x", "must be a finite JSON value, is NaN", None),
    ),
    (
        {"x": {1, 2}},
        ("x", "must be a finite JSON value, is {1, 2}", None),
    ),
    (
        [1],
        ("", "a space is a mapping of names to values and genes", None),
    ),
]


@pytest.mark.parametrize(("tree", "problem"), CASES, ids=[f"{case[1][0]}: {case[1][1]}"[:60] for case in CASES])
def test_a_broken_rule_is_told_in_these_words(tree, problem):
    assert problems(tree) == [problem]


TREE = {"model": {"d_model": {"int": [64, 512], "step": 64}, "ffn": "moe"}}


@pytest.mark.parametrize(
    ("constraint", "problem"),
    [
        (None, ("constraints[0]", "must be an expression, is null", None)),
        (
            "model.d_model <",
            (
                "constraints[0]",
                "cannot be read: expected a value, found the end (column 16 of `model.d_model <`)",
                None,
            ),
        ),
        ("model.d_modle < 100", ("constraints[0]", "unknown name 'model.d_modle'", "did you mean 'model.d_model'?")),
        ("parms < 100", ("constraints[0]", "unknown name 'parms'", "did you mean 'params'?")),
        (
            "model.d_model + 1",
            (
                "constraints[0]",
                "`model.d_model + 1` has no value for the baseline: must be true or false, is 321",
                None,
            ),
        ),
        (
            "model.ffn < 3",
            ("constraints[0]", "`model.ffn < 3` has no value for the baseline: '<' needs numbers, got \"moe\"", None),
        ),
    ],
)
def test_a_constraint_that_makes_no_sense_is_told_in_these_words(constraint, problem):
    assert problems(TREE, [constraint], exact={"params": len}) == [problem]


@pytest.mark.parametrize(
    ("baseline", "problem"),
    [
        ([1], ("baselines[0]", "must be a mapping, is [1]", None)),
        ({"model": {"d_model": 100}}, ("baselines[0].model.d_model", "must be 64 plus a multiple of 64, is 100", None)),
        ({"model": {"ffn": "relu2"}}, ("baselines[0].model.ffn", 'is fixed at "moe" in this space, got "relu2"', None)),
        (
            {"model": {"d_modle": 64}},
            (
                "baselines[0].model.d_modle",
                "unknown place in the space 'model.d_modle'",
                "did you mean 'model.d_model'?",
            ),
        ),
        ({"model": {"d_model": 512}}, ("baselines[0]", "breaks `model.d_model < 512`", "model.d_model = 512")),
    ],
)
def test_a_baseline_that_does_not_fit_is_told_in_these_words(baseline, problem):
    assert problems(TREE, ["model.d_model < 512"], baselines=[baseline]) == [problem]


@pytest.mark.parametrize(
    ("genome", "problem"),
    [
        ({"model": {"ffn": "moe"}}, ("model.d_model", "is missing", None)),
        ({"model": {"d_model": "wide"}}, ("model.d_model", 'must be a number, is "wide"', None)),
        ({"model": {"d_model": 128, "ffn": 3}}, ("model.ffn", 'is fixed at "moe" in this space, got 3', None)),
        (
            {"model": {"d_model": 64, "ffm": 1}},
            ("model.ffm", "unknown place in the space 'model.ffm'", "did you mean 'model.ffn'?"),
        ),
        ({"model": {"d_model": 512}}, ("constraints", "breaks `model.d_model < 512`", "model.d_model = 512")),
    ],
)
def test_a_genome_that_does_not_fit_is_told_in_these_words(genome, problem):
    with pytest.raises(SpaceError) as caught:
        Space.from_dict(TREE, ["model.d_model < 512"]).validate(genome)
    assert [(dotted(found.path), found.rule, found.help) for found in caught.value.problems] == [problem]


def test_all_problems_of_a_space_are_told_at_once():
    tree = {"a": {"int": [9, 1]}, "b": {"choice": []}, "c": {"expr": "1 +"}, "d": {"float": [0, 1], "lgo": True}}
    found = [path for path, _, _ in problems(tree, ["e > 1", "("])]
    assert found == ["a.int", "b.choice", "c.expr", "d.lgo", "constraints[0]", "constraints[1]"]


# --- how a problem is shown -------------------------------------------------------------------------------------------

FILE = """\
model:
  dropout: {float: [0.5, 0.1], setp: 0.1}
  n_heads: {list: {choice: [2, 4]}, length: model.layers}
"""


def test_problems_of_a_file_are_shown_with_line_column_and_caret():
    document = parse_yaml(FILE, file="space.yaml")
    with pytest.raises(SpaceError) as caught:
        Space.from_dict(document.value)
    assert str(SpaceError(document.locate(caught.value.problems))).splitlines()[:9] == [
        "space.yaml:2:20: model.dropout.float: low <= high must hold, got [0.5, 0.1]",
        "    2 |   dropout: {float: [0.5, 0.1], setp: 0.1}",
        "      |                    ^",
        "      = did you mean [0.1, 0.5]?",
        "space.yaml:2:32: model.dropout.setp: unknown option of a float gene 'setp'",
        "    2 |   dropout: {float: [0.5, 0.1], setp: 0.1}",
        "      |                                ^",
        "      = did you mean 'step'?",
        "space.yaml:3:45: model.n_heads.length: unknown length 'model.layers'",
    ]


def test_a_problem_without_a_file_is_its_path_and_its_rule():
    assert str(Problem(path=("model", "n_heads", 0), rule="is odd", help="try 2")) == (
        "model.n_heads[0]: is odd\n      = try 2"
    )


def test_a_long_line_is_shown_around_the_caret():
    source = "x" * 300 + "!" + "y" * 300
    shown = str(Problem(path=(), rule="odd", file="f", line=1, column=301, source=source)).splitlines()
    assert len(shown[1]) == len("    1 | ") + 120
    assert shown[1][shown[2].index("^")] == "!"


def test_a_problem_is_json_for_programs():
    problem = Problem(path=("a", 0), rule="is odd", value=3, file="f.yaml", line=2, column=5)
    assert json.loads(json.dumps(problem.as_dict())) == {
        **{"file": "f.yaml", "line": 2, "column": 5, "path": "a[0]"},
        **{"rule": "is odd", "value": 3, "help": None},
    }


def test_an_error_carries_all_its_problems_and_ends_a_command_with_2():
    error = SpaceError([Problem(path=("a",), rule="is odd"), Problem(path=("b",), rule="is even")])
    assert str(error) == "a: is odd\nb: is even"
    assert len(error.problems) == error.exit_code == 2


@pytest.mark.parametrize(
    ("name", "meant"), [("lerning_rate", "learning_rate"), ("d_modle", "d_model"), ("zzz", None), ("", None)]
)
def test_a_misspelt_name_is_recognised(name, meant):
    assert nearest(name, ["learning_rate", "d_model", "n_heads"]) == meant
