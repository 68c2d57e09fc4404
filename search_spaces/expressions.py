"""The small expression language of `expr`, `when` and `constraints`.

Text is parsed to a tree and the tree is walked; nothing is ever evaluated as Python. Arithmetic and comparison work
item by item when one side is a list. Names are paths into the genome (`model.n_heads`, `model.n_heads[0]`,
`data.mix["my corpus"]`) or names that the caller knows, such as exact costs (`params`).

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from search_spaces.errors import UsageError, nearest
from search_spaces.quantities import PATTERN, parse_quantity

MAX_LENGTH = 2000  # characters
MAX_TOKENS = 400
MAX_DEPTH = 64
_MAX_BITS = 1024  # of a power's result

Lookup = Callable[[str], Any]
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
    name: str
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
    names: frozenset[str]

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
            raise ExpressionError(f"must be true or false, is {_show(value)}{help}", self.text)
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
_COMPARISONS = {"==", "!=", "<", "<=", ">", ">=", "in", "not in"}
_WORDS = {"and", "or", "not", "in", "true", "false"}


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
    if len(tokens) > MAX_TOKENS:
        raise ExpressionError(f"more than {MAX_TOKENS} words and signs", text, tokens[MAX_TOKENS].column)
    parser = _Parser(text, tokens)
    root = parser.whole()
    return Expression(text, root, frozenset(parser.names))


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            column = position + len(text[position:]) - len(text[position:].lstrip()) + 1
            raise ExpressionError(f"unexpected '{text[column - 1]}'", text, column)
        kind = match.lastgroup or ""
        word = match.group(kind)
        yield _Token("symbol" if word in _WORDS else kind, word, match.start(kind) + 1)
        position = match.end()
    yield _Token("end", "", end + 1)


class _Parser:
    def __init__(self, text: str, tokens: list[_Token]) -> None:
        self.text, self.tokens = text, tokens
        self.position = 0
        self.depth = 0
        self.names: set[str] = set()

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

    def left(self, symbols: Sequence[str], part: Callable[[], Node]) -> Node:
        node = part()
        while sign := self.take(*symbols):
            node = Operation(sign.text, (node, part()), sign.column)
        return node

    def deeper(self, part: Callable[[], Node]) -> Node:
        """One level of recursion further down, within the limit."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error("nested too deeply")
        node = part()
        self.depth -= 1
        return node

    def test(self) -> Node:
        return self.deeper(lambda: self.left(["or"], lambda: self.left(["and"], self.negation)))

    def negation(self) -> Node:
        signs = []
        while sign := self.take("not"):
            signs.append(sign)
        node = self.comparison()
        for sign in reversed(signs):
            node = Operation("not", (node,), sign.column)
        return node

    def comparison(self) -> Node:
        left = self.sum()
        parts: list[Node] = []
        while sign := self.take(*_COMPARISONS, "not"):
            symbol = sign.text
            if symbol == "not":
                self.expect("in")
                symbol = "not in"
            right = self.sum()
            parts.append(Operation(symbol, (left, right), sign.column))
            left = right
        if not parts:
            return left
        node = parts[0]
        for part in parts[1:]:  # a < b < c reads as a < b and b < c
            node = Operation("and", (node, part), part.column)
        return node

    def sum(self) -> Node:
        return self.left(["+", "-"], lambda: self.left(["*", "/", "//", "%"], self.unary))

    def unary(self) -> Node:
        if sign := self.take("-", "+"):
            node = self.deeper(self.unary)
            return node if sign.text == "+" else Operation("negate", (node,), sign.column)
        return self.power()

    def power(self) -> Node:
        base = self.postfix()
        if sign := self.take("**"):
            return Operation("**", (base, self.deeper(self.unary)), sign.column)
        return base

    def postfix(self) -> Node:
        node = self.atom()
        while sign := self.take("["):
            index = self.test()
            self.expect("]")
            node = Subscript(node, index, sign.column)
        return node

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
        self.position += token.kind != "end"
        if token.kind == "number":
            return Constant(_number(token.text), token.column)
        if token.kind == "string":
            return Constant(token.text[1:-1], token.column)
        if token.kind == "name":
            return self.name_or_call(token)
        self.position -= token.kind != "end"
        raise self.error(f"expected a value, found '{token.text}'" if token.text else "expected a value, found the end")

    def name_or_call(self, token: _Token) -> Node:
        if not self.take("("):
            self.names.add(token.text)
            return Name(token.text, token.column)
        if token.text not in FUNCTIONS:
            close = nearest(token.text, FUNCTIONS)
            advice = f"; did you mean '{close}'?" if close else f"; there are {', '.join(sorted(FUNCTIONS))}"
            raise ExpressionError(f"unknown function '{token.text}'{advice}", self.text, token.column)
        arguments = self.arguments(")")
        least, most = FUNCTIONS[token.text].arity
        if not least <= len(arguments) <= most:
            wanted = str(least) if least == most else f"{least} or more"
            message = f"{token.text}() takes {wanted} arguments, got {len(arguments)}"
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
            case Name(name=name, column=column):
                return self.named(name, column)
            case Items(items=items):
                return [self.value(item) for item in items]
            case Subscript():
                return self.subscript(node)
            case Call(function=function, arguments=arguments, column=column):
                values = [self.value(argument) for argument in arguments]
                return self.guard(column, lambda: FUNCTIONS[function].call(*values), f"{function}()")
            case Operation(symbol="and" | "or" as symbol, operands=(left, right)):
                first = self.truth(left)
                return self.truth(right) if first == (symbol == "and") else first
            case Operation(symbol="not", operands=(operand,)):
                return not self.truth(operand)
            case Operation(symbol=symbol, operands=operands, column=column):
                values = [self.value(operand) for operand in operands]
                return self.guard(column, lambda: OPERATORS[symbol](*values), f"'{symbol}'")

    def named(self, name: str, column: int) -> Any:
        try:
            return self.lookup(name)
        except KeyError:
            raise ExpressionError(f"unknown name '{name}'", self.text, column) from None

    def subscript(self, node: Subscript) -> Any:
        base, index = self.value(node.base), self.value(node.index)
        try:
            return base[index]
        except (KeyError, IndexError, TypeError):
            raise ExpressionError(f"{_show(base)} has no item {_show(index)}", self.text, node.column) from None

    def truth(self, node: Node) -> bool:
        value = self.value(node)
        if not isinstance(value, bool):
            raise ExpressionError(f"must be true or false, is {_show(value)}", self.text, node.column)
        return value

    def guard(self, column: int, compute: Callable[[], Any], what: str) -> Any:
        try:
            result = compute()
        except ZeroDivisionError:
            raise ExpressionError("division by zero", self.text, column) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise ExpressionError(f"{what}: {error}", self.text, column) from None
        if isinstance(result, float) and not math.isfinite(result):
            raise ExpressionError(f"{what} gives a number that is not finite", self.text, column)
        return result


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _numeric(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"needs numbers, got {_show(value)}")
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
    if abs(base) > 1 and math.log2(abs(base)) * abs(exponent) > _MAX_BITS:
        raise OverflowError("the power is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError("a root of a negative number")
    return result


def _contains(item: Any, items: Any) -> bool:
    if not isinstance(items, list):
        raise TypeError(f"needs a list on its right, got {_show(items)}")
    return item in items


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
    "not in": lambda item, items: not _contains(item, items),
    "negate": _negate,
}


def _numbers(values: tuple[Any, ...]) -> list[int | float]:
    """The arguments of min, max and sum: one list, or several numbers."""
    items = values[0] if len(values) == 1 and isinstance(values[0], list) else list(values)
    return [_numeric(item) for item in items]


def _truths(items: Any) -> list[bool]:
    """The argument of all and any; a single truth counts as a list of one, as a field may be one value or one a
    layer."""
    items = [items] if isinstance(items, bool) else items
    if not isinstance(items, list) or not all(isinstance(item, bool) for item in items):
        raise TypeError(f"needs truths, got {_show(items)}")
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
        raise TypeError(f"needs a list, got {_show(value)}")
    return len(value)


@dataclass(frozen=True)
class Function:
    call: Callable[..., Any]
    arity: tuple[int, int] = (1, 1)


_MANY = 1000

FUNCTIONS: dict[str, Function] = {
    "min": Function(lambda *values: min(_numbers(values)), (1, _MANY)),
    "max": Function(lambda *values: max(_numbers(values)), (1, _MANY)),
    "sum": Function(lambda *values: sum(_numbers(values)), (1, _MANY)),
    "abs": Function(_each(abs)),
    "round": Function(_each(lambda value: math.floor(value + 0.5))),
    "round_to": Function(_round_to, (2, 2)),
    "floor": Function(_each(math.floor)),
    "ceil": Function(_each(math.ceil)),
    "len": Function(_length),
    "all": Function(lambda items: all(_truths(items))),
    "any": Function(lambda items: any(_truths(items))),
}
