"""The small expression language of `expr`, `when` and `constraints`.

Text is parsed to a tree and the tree is walked; nothing is ever evaluated as Python. Arithmetic and comparison work
item by item when one side is a list, and so do `and`, `or` and `not`. Names are paths into the genome (`model.n_heads`,
`model.n_heads[0]`, `data.mix["my corpus"]`) or names that the caller knows, such as exact costs (`params`).

Grammar, loosest binding first:

    test     = and ("or" and)*
    and      = not ("and" not)*
    not      = "not" not | compare
    compare  = sum (("==" | "!=" | "<" | "<=" | ">" | ">=" | "in" | "not in") sum)*
    sum      = product (("+" | "-") product)*
    product  = unary (("*" | "/" | "//" | "%") unary)*
    unary    = "-" unary | power
    power    = postfix ("**" unary)?
    postfix  = atom ("[" test "]")*
    atom     = number | string | "true" | "false" | name | function "(" tests ")" | "(" test ")" | "[" tests "]"
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from search_spaces.errors import UsageError, nearest
from search_spaces.genome import shown
from search_spaces.quantities import PATTERN, parse_quantity

MAX_LENGTH = 2000  # characters
MAX_TOKENS = 400
MAX_NESTING = 48  # of brackets and signs, as the parser goes down
MAX_DEPTH = 201  # of the tree, as the walker goes down
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


# --- the tree ---------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Expression:
    """A parsed expression. `names` are the paths and cost names that it reads."""

    text: str
    root: Node
    names: frozenset[Place]

    def __str__(self) -> str:
        return self.text

    def evaluate(self, lookup: Lookup) -> Any:
        """The value of the expression; raises ExpressionError with the place when it has none."""
        return _Walker(self.text, lookup).value(self.root)

    def test(self, lookup: Lookup) -> bool:
        """The value as a truth; raises ExpressionError when it is not one, a list of truths included."""
        value = self.evaluate(lookup)
        if not isinstance(value, bool):
            help = "; wrap it in all(...) or any(...)" if isinstance(value, list) else ""
            raise ExpressionError(f"must be true or false, is {shown(value)}{help}", self.text)
        return value


# --- parsing ----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    rf"""\s*(?:
      (?P<number>{PATTERN}(?![A-Za-z0-9_.]) | (?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?![A-Za-z0-9_.]))
    | (?P<string>'[^']*'|"[^"]*")
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)
    | (?P<symbol>\*\*|//|==|!=|<=|>=|[-+*/%<>()\[\],])
    )""",
    re.VERBOSE,
)
_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=", "in", "not in")
_WORDS = {"and", "or", "not", "in", "true", "false"}
_LEVELS: dict[str, int] = {
    "or": 1,
    "and": 2,
    **dict.fromkeys(_COMPARISONS, 4),
    **dict.fromkeys(("+", "-"), 5),
    **dict.fromkeys(("*", "/", "//", "%"), 6),
}
"""How strongly a sign between two values binds; `not` stands at 3, the signs of a number at 7, powers above."""


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int


def parse(text: str) -> Expression:
    """Parse one expression; raises ExpressionError with the column of what is wrong."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters", text[:60] + "...")
    tokens = list(_tokens(text))
    if len(tokens) > MAX_TOKENS + 1:  # one of them says where the text ends
        raise ExpressionError(f"more than {MAX_TOKENS} words and signs", text, tokens[MAX_TOKENS].column)
    parser = _Parser(text, tokens)
    root = parser.whole()
    _refuse_deep(root, text)
    return Expression(text, root, frozenset(parser.names))


def _refuse_deep(root: Node, text: str) -> None:
    """Refuse a tree that the walker could not walk; long sums are trees as deep as they are long."""
    level: list[Node] = [root]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise ExpressionError("nested too deeply", text, level[0].column)


def _children(node: Node) -> tuple[Node, ...]:
    match node:
        case Items(items=items):
            return items
        case Subscript(base=base, index=index):
            return (base, index)
        case Call(arguments=nodes) | Operation(operands=nodes):
            return nodes
    return ()


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            column = position + len(text[position:]) - len(text[position:].lstrip()) + 1
            found = text[column - 1]
            message = "a string is not closed" if found in "'\"" else f"unexpected '{found}'"
            raise ExpressionError(message, text, column)
        kind = match.lastgroup or ""
        word = match.group(kind)
        yield _Token("symbol" if word in _WORDS else kind, word, match.start(kind) + 1)
        position = match.end()
    yield _Token("end", "", end + 1)


class _Parser:
    """Precedence climbing: `test(level)` reads everything that binds at least as strongly as `level`."""

    def __init__(self, text: str, tokens: list[_Token]) -> None:
        self.text, self.tokens = text, tokens
        self.position = 0
        self.nesting = 0
        self.names: set[Place] = set()

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def whole(self) -> Node:
        node = self.test()
        if self.token.kind != "end":
            raise self.error(f"unexpected '{self.token.text}'")
        return node

    def error(self, message: str) -> ExpressionError:
        return ExpressionError(message, self.text, self.token.column)

    def take(self, *symbols: str) -> _Token | None:
        if self.token.kind == "symbol" and self.token.text in symbols:
            self.position += 1
            return self.tokens[self.position - 1]
        return None

    def expect(self, symbol: str) -> None:
        if not self.take(symbol):
            found = f"'{self.token.text}'" if self.token.text else "the end"
            raise self.error(f"expected '{symbol}', found {found}")

    def test(self, level: int = 0) -> Node:
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise self.error("nested too deeply")
        left = self.signed(level)
        chained: Node | None = None  # the value in the middle of a < b < c
        while (sign := self.between(level)) is not None:
            symbol = sign.text
            if symbol == "not":
                self.expect("in")
                symbol = "not in"
            right = self.test(_LEVELS[symbol] + 1)
            if chained is not None and symbol in _COMPARISONS:  # a < b < c reads as a < b and b < c
                left = Operation("and", (left, Operation(symbol, (chained, right), sign.column)), sign.column)
            else:
                left = Operation(symbol, (left, right), sign.column)
            chained = right if symbol in _COMPARISONS else None
        self.nesting -= 1
        return left

    def between(self, level: int) -> _Token | None:
        """The next sign between two values, if it binds strongly enough."""
        text = "not in" if self.token.text == "not" else self.token.text
        if self.token.kind != "symbol" or _LEVELS.get(text, -1) < max(level, 1):
            return None
        self.position += 1
        return self.tokens[self.position - 1]

    def signed(self, level: int) -> Node:
        if sign := self.take("not"):
            if level > 3:
                self.position -= 1
                raise self.error("expected a value, found 'not'")
            return Operation("not", (self.test(3),), sign.column)
        if sign := self.take("-", "+"):
            node = self.test(7)
            return node if sign.text == "+" else Operation("-", (node,), sign.column)
        base = self.postfix()
        if sign := self.take("**"):
            return Operation("**", (base, self.test(7)), sign.column)
        return base

    def postfix(self) -> Node:
        node = self.atom()
        while sign := self.take("["):
            index = self.test()
            self.expect("]")
            if isinstance(node, Name) and isinstance(index, Constant) and isinstance(index.value, str):
                node = Name((*node.place, index.value), node.column)
            else:
                self.read(node)
                node = Subscript(node, index, sign.column)
        self.read(node)
        return node

    def read(self, node: Node) -> None:
        """Remember a name that is complete: `data.mix["web"]` reads one part, not the whole mix."""
        if isinstance(node, Name):
            self.names.add(node.place)

    def atom(self) -> Node:
        token = self.token
        if self.take("("):
            node = self.test()
            self.expect(")")
            return node
        if self.take("["):
            return Items(self.arguments("]"), token.column)
        if word := self.take("true", "false"):
            return Constant(word.text == "true", token.column)
        if token.kind in ("symbol", "end"):
            raise self.error(f"expected a value, found {repr(token.text) if token.text else 'the end'}")
        self.position += 1
        if token.kind == "number":
            return Constant(self.number(token), token.column)
        if token.kind == "string":
            return Constant(token.text[1:-1], token.column)
        return self.name_or_call(token)

    def number(self, token: _Token) -> int | float:
        value = _number(token.text)
        if not _finite(value):
            raise ExpressionError("number is too large", self.text, token.column)
        return value

    def name_or_call(self, token: _Token) -> Node:
        if not self.take("("):
            return Name(tuple(token.text.split(".")), token.column)
        if token.text not in FUNCTIONS:
            close = nearest(token.text, FUNCTIONS)
            advice = f"; did you mean '{close}'?" if close else f"; there are {', '.join(sorted(FUNCTIONS))}"
            raise ExpressionError(f"unknown function '{token.text}'{advice}", self.text, token.column)
        arguments = self.arguments(")")
        least, most = FUNCTIONS[token.text].arity
        if not least <= len(arguments) <= most:
            wanted = f"{least} argument{'s' if least > 1 else ''}" if least == most else f"{least} or more arguments"
            message = f"{token.text}() takes {wanted}, got {len(arguments)}"
            raise ExpressionError(message, self.text, token.column)
        return Call(token.text, arguments, token.column)

    def arguments(self, closing: str) -> tuple[Node, ...]:
        nodes: list[Node] = []
        while not self.take(closing):
            if nodes:
                self.expect(",")
            nodes.append(self.test())
        return tuple(nodes)


def _number(text: str) -> int | float:
    quantity = parse_quantity(text)
    if quantity is not None:
        return quantity
    return int(text) if text.isdigit() else float(text)


# --- walking ----------------------------------------------------------------------------------------------------------


class _Walker:
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
        if not _finite(result):
            raise ExpressionError(f"{what} gives a number that is too large", self.text, column)
        return result


def _finite(value: Any) -> bool:
    """Whether a value holds no number that JSON cannot carry and no whole number beyond reason."""
    if isinstance(value, list):
        return all(_finite(item) for item in value)
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
    arity: tuple[int, int] = (1, 1)


_MANY = 1000

FUNCTIONS: dict[str, Function] = {
    "min": Function(lambda *values: min(_numbers(values)), (1, _MANY)),
    "max": Function(lambda *values: max(_numbers(values)), (1, _MANY)),
    "sum": Function(lambda *values: sum(_numbers(values)) if values != ([],) else 0, (1, _MANY)),
    "abs": Function(_each(abs)),
    "round": Function(_each(lambda value: math.floor(value + 0.5))),
    "round_to": Function(_round_to, (2, 2)),
    "floor": Function(_each(math.floor)),
    "ceil": Function(_each(math.ceil)),
    "len": Function(_length),
    "all": Function(lambda items: all(_truths(items))),
    "any": Function(lambda items: any(_truths(items))),
}
