"""Guards the two sources that need no download: the code and the documentation of the running Python."""

import ast
from itertools import islice

import pytest

from trainer.data.sources import Skipped, fingerprint, read_documents
from trainer.errors import DataError
from trainer.recipe import Source

MODULES = 40
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def first(path, modules=MODULES):
    """The documents of the first modules of the standard library."""
    return list(islice(read_documents(Source(path=path), (), Skipped()), modules))


@pytest.fixture(scope="module")
def code():
    return first("python:stdlib")


@pytest.fixture(scope="module")
def docs():
    return first("python:docs")


@pytest.fixture(scope="module")
def programs(code):
    """The modules that are still whole programs: where a docstring was all a block held, the block is left empty."""
    parsed = []
    for text in code:
        try:
            parsed.append(ast.parse(text))
        except SyntaxError as error:
            assert "expected an indented block" in str(error)
    return parsed


def test_a_document_of_either_source_is_a_module(code, docs):
    abc = next(i for i, text in enumerate(code) if "def abstractmethod(funcobj):" in text)
    assert docs[abc].startswith("abc\nAbstract Base Classes (ABCs) according to PEP 3119.")
    assert "\n\nabc.ABC\nHelper class that provides a standard way to create an ABC" in docs[abc]


def test_docstrings_are_not_in_the_code(programs):
    """No text may be in two domains, or the score of one would measure the other."""
    assert len(programs) > 0.75 * MODULES
    blocks = [node for program in programs for node in ast.walk(program) if isinstance(node, DOCUMENTED)]
    assert len(blocks) > 500
    assert [block for block in blocks if ast.get_docstring(block)] == []


def test_code_is_left_as_it_stands_between_the_docstrings(code):
    abc = next(text for text in code if "def abstractmethod(funcobj):" in text)
    assert "    funcobj.__isabstractmethod__ = True\n    return funcobj\n" in abc
    assert "# Copyright 2007 Google, Inc." in abc


def test_both_are_the_same_every_time(code, docs):
    assert first("python:stdlib", 5) == code[:5]
    assert first("python:docs", 5) == docs[:5]


def test_their_fingerprint_tells_them_apart():
    assert fingerprint(Source(path="python:stdlib"), ()) != fingerprint(Source(path="python:docs"), ())


@pytest.mark.parametrize(("misspelt", "meant"), [("python:stdlb", "python:stdlib"), ("python:doc", "python:docs")])
def test_an_unknown_python_source_gets_the_nearest_name(misspelt, meant):
    with pytest.raises(DataError, match=f"'{misspelt}' is unknown; did you mean '{meant}'"):
        first(misspelt)


def test_a_name_like_no_other_gets_the_code():
    with pytest.raises(DataError, match="did you mean 'python:stdlib'"):
        first("python:zzzzzzzzz")
