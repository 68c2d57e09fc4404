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

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from search_spaces.errors import nearest
from search_spaces.evaluation import (
    FUNCTIONS,
    Call,
    Constant,
    ExpressionError,
    Items,
    Lookup,
    Name,
    Node,
    Operation,
    Place,
    Subscript,
    Walker,
    is_reasonable,
)
from search_spaces.genome import shown
from search_spaces.quantities import PATTERN, parse_quantity

MAX_LENGTH = 2000  # characters
MAX_TOKENS = 400
MAX_NESTING = 48  # of brackets and signs, as the parser goes down
MAX_DEPTH = 201  # of the tree, as the walker goes down


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
        return Walker(self.text, lookup).value(self.root)

    def test(self, lookup: Lookup) -> bool:
        """The value as a truth; raises ExpressionError when it is not one, a list of truths included."""
        value = self.evaluate(lookup)
        if not isinstance(value, bool):
            help = "; wrap it in all(...) or any(...)" if isinstance(value, list) else ""
            raise ExpressionError(f"must be true or false, is {shown(value)}{help}", self.text)
        return value


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
        if not is_reasonable(value):
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
