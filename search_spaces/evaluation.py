"""What expressions mean: their tree, their operators and functions, and the walk that gives them a value."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from search_spaces.errors import UsageError
from search_spaces.genome import shown

MAX_BITS = 1024  # of a whole number

Place = tuple[str, ...]
"""What a name reads: the keys from the root of a genome, or the single name of an exact cost."""

Lookup = Callable[[Place], Any]
"""Gives the value of a name; raises KeyError for a name that does not exist."""


class ExpressionError(UsageError):
    """An expression that cannot be parsed or evaluated. `column` counts from 1 within the expression's text."""

    def __init__(self, message: str, text: str, column: int = 1) -> None:
        self.message, self.text, self.column = message, text, column
        super().__init__(f"{message}\n  {text}\n  {' ' * (column - 1)}^")


@dataclass(frozen=True)
class Constant:
    value: Any
    column: int


@dataclass(frozen=True)
class Name:
    place: Place
    column: int


@dataclass(frozen=True)
class Subscript:
    base: Node
    index: Node
    column: int


@dataclass(frozen=True)
class Items:
    items: tuple[Node, ...]
    column: int


@dataclass(frozen=True)
class Operation:
    symbol: str
    operands: tuple[Node, ...]
    column: int


@dataclass(frozen=True)
class Call:
    function: str
    arguments: tuple[Node, ...]
    column: int


Node = Constant | Name | Subscript | Items | Operation | Call


class Walker:
    """Evaluates a tree; every failure becomes an ExpressionError at the column of the node that failed."""

    def __init__(self, text: str, lookup: Lookup) -> None:
        self.text, self.lookup = text, lookup

    def value(self, node: Node) -> Any:
        match node:
            case Constant(value=value):
                return value
            case Name(place=place, column=column):
                return self.named(place, column)
            case Items(items=items):
                return [self.value(item) for item in items]
            case Subscript():
                return self.subscript(node)
            case Call(function=function, arguments=arguments, column=column):
                values = [self.value(argument) for argument in arguments]
                return self.guard(column, FUNCTIONS[function].call, values, f"{function}()")
            case Operation(symbol="and" | "or" as symbol, operands=(left, right)):
                return self.both(symbol, left, right)
            case Operation(symbol="not", operands=(operand,)):
                truth = self.truth(operand)
                return [not one for one in truth] if isinstance(truth, list) else not truth
            case Operation(symbol=symbol, operands=operands, column=column):
                values = [self.value(operand) for operand in operands]
                operation = OPERATORS[symbol] if len(values) == 2 else _negate
                return self.guard(column, operation, values, f"'{symbol}'")

    def named(self, place: Place, column: int) -> Any:
        try:
            return self.lookup(place)
        except KeyError:
            raise ExpressionError(f"unknown name '{'.'.join(place)}'", self.text, column) from None

    def subscript(self, node: Subscript) -> Any:
        base, index = self.value(node.base), self.value(node.index)
        try:
            return base[index]
        except (KeyError, IndexError, TypeError):
            raise ExpressionError(f"{shown(base)} has no item {shown(index)}", self.text, node.column) from None

    def both(self, symbol: str, left: Node, right: Node) -> bool | list[bool]:
        """`and` and `or`; the right side is looked at only where the left one does not decide."""
        first = self.truth(left)
        if isinstance(first, bool) and first == (symbol == "or"):
            return first
        second = self.truth(right)
        if isinstance(first, bool) and isinstance(second, bool):
            return second
        join = operator.and_ if symbol == "and" else operator.or_
        joined: list[bool] = self.guard(right.column, _item_by_item(join), [first, second], f"'{symbol}'")
        return joined

    def truth(self, node: Node) -> bool | list[bool]:
        value = self.value(node)
        if isinstance(value, bool) or (isinstance(value, list) and all(isinstance(item, bool) for item in value)):
            return value
        raise ExpressionError(f"must be true or false, is {shown(value)}", self.text, node.column)

    def guard(self, column: int, function: Callable[..., Any], values: list[Any], what: str) -> Any:
        try:
            result = function(*values)
        except ZeroDivisionError:
            raise ExpressionError("division by zero", self.text, column) from None
        except OverflowError:
            raise ExpressionError(f"{what} gives a number that is too large", self.text, column) from None
        except (TypeError, ValueError) as error:
            raise ExpressionError(f"{what} {error}", self.text, column) from None
        if not is_reasonable(result):
            raise ExpressionError(f"{what} gives a number that is too large", self.text, column)
        return result


def is_reasonable(value: Any) -> bool:
    """Whether a value holds no number that JSON cannot carry and no whole number beyond reason."""
    if isinstance(value, list):
        return all(is_reasonable(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or value.bit_length() <= MAX_BITS


def _numeric(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"needs numbers, got {shown(value)}")
    return value


def _item_by_item(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(left: Any, right: Any) -> Any:
        if isinstance(left, list) and isinstance(right, list):
            if len(left) != len(right):
                raise ValueError(f"lists of {len(left)} and {len(right)} items do not pair up")
            return [apply(a, b) for a, b in zip(left, right, strict=True)]
        if isinstance(left, list):
            return [apply(item, right) for item in left]
        if isinstance(right, list):
            return [apply(left, item) for item in right]
        return function(left, right)

    return apply


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return _item_by_item(lambda left, right: function(_numeric(left), _numeric(right)))


def _order(function: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def compare(left: Any, right: Any) -> bool:
        if isinstance(left, str) and isinstance(right, str):
            return function(left, right)
        return function(_numeric(left), _numeric(right))

    return _item_by_item(compare)


def _power(base: Any, exponent: Any) -> Any:
    if abs(base) > 1 and math.log2(abs(base)) * exponent > MAX_BITS:
        raise OverflowError
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError("would take a root of a negative number")
    return result


def _contains(item: Any, items: Any) -> bool | list[bool]:
    if not isinstance(items, list):
        raise TypeError(f"needs a list on its right, got {shown(items)}")
    return [one in items for one in item] if isinstance(item, list) else item in items


def _lacks(item: Any, items: Any) -> bool | list[bool]:
    found = _contains(item, items)
    return [not one for one in found] if isinstance(found, list) else not found


def _negate(value: Any) -> Any:
    return [_negate(item) for item in value] if isinstance(value, list) else -_numeric(value)


OPERATORS: dict[str, Callable[..., Any]] = {
    "+": _arithmetic(operator.add),
    "-": _arithmetic(operator.sub),
    "*": _arithmetic(operator.mul),
    "/": _arithmetic(operator.truediv),
    "//": _arithmetic(operator.floordiv),
    "%": _arithmetic(operator.mod),
    "**": _arithmetic(_power),
    "==": _item_by_item(operator.eq),
    "!=": _item_by_item(operator.ne),
    "<": _order(operator.lt),
    "<=": _order(operator.le),
    ">": _order(operator.gt),
    ">=": _order(operator.ge),
    "in": _contains,
    "not in": _lacks,
}


def _numbers(values: tuple[Any, ...]) -> list[int | float]:
    """The arguments of min, max and sum: one list, or several numbers."""
    items = values[0] if len(values) == 1 and isinstance(values[0], list) else list(values)
    if not items:
        raise ValueError("needs at least one number, got an empty list")
    return [_numeric(item) for item in items]


def _truths(items: Any) -> list[bool]:
    """The argument of all and any; a single truth counts as a list of one, as a field may be one value or one a
    layer."""
    items = [items] if isinstance(items, bool) else items
    if not isinstance(items, list) or not all(isinstance(item, bool) for item in items):
        raise TypeError(f"needs truths, got {shown(items)}")
    return items


def _each(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        return [apply(item) for item in value] if isinstance(value, list) else function(_numeric(value))

    return apply


def _round_to(value: Any, step: Any) -> Any:
    """The multiple of `step` nearest to `value`, halves up, and never less than one step: a width cannot be zero."""
    if isinstance(value, list):
        return [_round_to(item, step) for item in value]
    if _numeric(step) <= 0:
        raise ValueError(f"the step must be positive, got {step}")
    return max(1, math.floor(_numeric(value) / step + 0.5)) * step


def _length(value: Any) -> int:
    if not isinstance(value, list | dict | str):
        raise TypeError(f"needs a list, got {shown(value)}")
    return len(value)


@dataclass(frozen=True)
class Function:
    call: Callable[..., Any]
    about: str
    arity: tuple[int, int] = (1, 1)


_MANY = 1000

FUNCTIONS: dict[str, Function] = {
    "min": Function(lambda *values: min(_numbers(values)), "the least of several numbers, or of a list", (1, _MANY)),
    "max": Function(lambda *values: max(_numbers(values)), "the greatest of several numbers, or of a list", (1, _MANY)),
    "sum": Function(
        lambda *values: sum(_numbers(values)) if values != ([],) else 0,
        "the sum of several numbers or a list",
        (1, _MANY),
    ),
    "abs": Function(_each(abs), "the absolute value, item by item"),
    "round": Function(
        _each(lambda value: math.floor(value + 0.5)), "the nearest whole number, halves up, item by item"
    ),
    "round_to": Function(
        _round_to, "`round_to(x, step)`: the multiple of step nearest to x, at least one step, item by item", (2, 2)
    ),
    "floor": Function(_each(math.floor), "the next whole number below, item by item"),
    "ceil": Function(_each(math.ceil), "the next whole number above, item by item"),
    "len": Function(_length, "the number of items of a list, or characters of a word"),
    "all": Function(lambda items: all(_truths(items)), "whether every item of a list is true"),
    "any": Function(lambda items: any(_truths(items)), "whether some item of a list is true"),
}
