"""Filters of samples by their columns: SQL-like conditions, which are parsed here and computed by Arrow.

    year > 2020 AND license = 'MIT'
    width * height >= 1e6 AND NOT ("source url" LIKE '%flickr%' OR license IS NULL)
    split IN ('train', 'val') OR score BETWEEN 0.3 AND 1

An expression has columns, literals and these operators only: no functions, no subqueries, no files. Each step is one
pass of Arrow over a block of rows, so the time is linear in the number of rows and the length of the expression.
"""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints, blocks
from embedcache.dataset.pairs import name_caches
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, SettingError, one_line
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache
from embedcache.store.layout import SAMPLES

_MAX_LENGTH = 10_000
_MAX_DEPTH = 50
_BLOCK = 2**18
_INT64_DIGITS = 19
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)|(?P<text>'(?:[^']|'')*')|(?P<quoted>"(?:[^"]|"")+")"""
    r"""|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|<>|!=|==|[=<>(),+*/-])|(?P<end>$))""",
    re.IGNORECASE,
)
_KEYWORDS = {"and", "or", "not", "in", "like", "ilike", "between", "is", "null", "true", "false"}
_COMPARISONS = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_ARITHMETIC = {"+": pc.add_checked, "-": pc.subtract_checked, "*": pc.multiply_checked, "/": pc.divide}


def rows_where(caches: Sequence[Cache], expression: str, *, timeout_s: float | None = None) -> Ints:
    """Return the samples for which an expression is true: (M,) int64, ascending and counted across caches.

    As in SQL, a comparison with a missing value is neither true nor false. NaN is a missing value. Text is compared
    with a number as the number that it holds, as cells of CSV files are text. Removed samples are left out.

    Memory: 8 bytes per sample that passes, and a block of the columns that the expression names.

    Args:
        caches: caches of the samples, all of which have the columns.
        expression: such as `year > 2020 AND license = 'MIT'`. Operators are `= != < <= > >=`, `+ - * /`, `AND OR NOT`,
            `IN (…)`, `LIKE`, `ILIKE`, `BETWEEN … AND …` and `IS NULL`. Text is in single quotes, and the name of a
            column in double quotes if it is not a word.
        timeout_s: most seconds to spend. If None, any.

    Raises:
        SettingError: the expression cannot be parsed, compares values of different kinds, or takes too long.
        UnknownNameError: a cache has no such column; the message lists its columns.

    Example:
        >>> cache = embedcache.Cache("flickr")
        >>> len(rows_where([cache], "split = 'train' AND key LIKE '%1'")) <= len(cache)
        True
    """
    condition = parse_where(expression)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s

    parts = [np.empty(0, np.int64)]
    first = 0
    for cache in caches:
        for name in condition.columns:
            if name not in cache.columns:
                raise unknown_name("column", name, cache.columns)

        # Blocks bound the memory, and let the deadline interrupt a slow expression.
        for rows in blocks(len(cache), _BLOCK):
            if deadline is not None and time.monotonic() > deadline:
                raise SettingError(f"where: expected a result within {timeout_s:g} s; give a shorter expression")

            table = cache.table(SAMPLES, condition.columns, rows=rows)
            passing = rows.start + condition.rows(table, rows.stop - rows.start)
            parts.append(first + passing[~np.isin(passing, cache.removed)])
        first += len(cache)
    return np.concatenate(parts)


def samples_within(caches: Sequence[Cache], selection: Path | str | None, where: str | None) -> Ints | None:
    """Return the samples of a selection for which an expression is true, ascending; None if neither is given.

    Raises:
        DataError: no sample passes.
        SettingError, UnknownNameError: as in `rows_where`.
        PathError, CorruptError: as in `read_selection`.
    """
    samples = None if selection is None else read_selection(selection, caches)
    if where is None:
        return samples

    passing = rows_where(caches, where)
    if samples is not None:
        passing = np.intersect1d(samples, passing, assume_unique=True)

    if not len(passing):
        scope = "" if selection is None else f" within {selection}"
        raise DataError(
            f"where: expected samples of {name_caches(caches)}{scope} with {where}, got none; loosen the condition"
        )
    return passing


class _Value(NamedTuple):
    """A column, a literal or a result, and the words that it was computed from."""

    values: Any  # an Arrow array or scalar
    words: str

    @property
    def kind(self) -> str:
        """Kind of the values for a person."""
        of = self.values.type
        if pa.types.is_string(of) or pa.types.is_large_string(of):
            return "text"
        if pa.types.is_integer(of) or pa.types.is_floating(of) or pa.types.is_decimal(of):
            return "a number"
        if pa.types.is_boolean(of):
            return "true or false"
        return "missing" if pa.types.is_null(of) else str(of)


class _Step(NamedTuple):
    """A step of a condition, which replaces the last `num_values` values by one."""

    compute: Callable[..., Any]
    num_values: int


class Condition(NamedTuple):
    """A parsed expression: steps in the order in which a stack of values computes them, and the columns they read."""

    steps: list[_Step | str | pa.Scalar]  # a string is the name of a column
    columns: list[str]

    def rows(self, table: pa.Table, num_rows: int) -> Ints:
        """Return the rows of a table for which the expression is true, ascending."""
        stack: list[_Value] = []
        for step in self.steps:
            if isinstance(step, str):
                stack.append(_Value(_without_nan(table[step]), f"column {step!r}"))
            elif isinstance(step, _Step):
                values = stack[-step.num_values :]
                del stack[-step.num_values :]
                stack.append(_Value(_compute(step, values), "a result"))
            else:
                stack.append(_Value(step, repr(step.as_py())))

        # The stack must end in one condition; a constant one is true of all rows or of none.
        (is_true,) = _require("a condition", "true or false", stack)
        if isinstance(is_true, pa.Scalar):
            return np.arange(num_rows if is_true.as_py() else 0)
        return np.flatnonzero(pc.fill_null(is_true, False).to_numpy())  # noqa: FBT003


def _without_nan(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.is_nan(values), None, values) if pa.types.is_floating(values.type) else values


def _compute(step: _Step, values: Sequence[_Value]) -> Any:
    try:
        return step.compute(*values)
    except pa.ArrowException as error:
        words = " and ".join(value.words for value in values)
        raise SettingError(f"where: cannot compute with {words}: {one_line(error)}") from None


def _require(what: str, kind: str, values: Sequence[_Value]) -> list[Any]:
    """Return Arrow values, all of which must be of a kind or missing."""
    for value in values:
        if value.kind not in (kind, "missing"):
            raise SettingError(f"where: expected {kind} for {what}, got {value.words}, which is {value.kind}")

    # A missing value has no type in Arrow, so it gets the type of the others.
    to_type = {"text": pa.large_string(), "true or false": pa.bool_()}.get(kind, pa.float64())
    return [value.values.cast(to_type) if value.kind == "missing" else value.values for value in values]


def _alike(what: str, values: Sequence[_Value]) -> list[Any]:
    """Return Arrow values of one kind. Text that is compared with numbers is parsed."""
    kinds = {value.kind for value in values} - {"missing"}
    if kinds == {"text", "a number"}:
        values = _to_numbers(values)

    # The first value with a kind decides. If all are missing, any kind would do.
    kind = "text"
    for value in reversed(values):
        kind = kind if value.kind == "missing" else value.kind
    return _require(what, kind, values)


def _to_numbers(values: Sequence[_Value]) -> list[_Value]:
    """Parse the texts among values as numbers."""
    return [_to_number(value) if value.kind == "text" else value for value in values]


def _to_number(value: _Value) -> _Value:
    """Parse a column of text as numbers, with blank cells as missing values."""
    if isinstance(value.values, pa.Scalar):
        return value
    cells = pc.utf8_trim_whitespace(value.values)
    try:
        return value._replace(values=pc.if_else(pc.equal(cells, ""), None, cells).cast(pa.float64()))
    except pa.ArrowInvalid as error:
        raise SettingError(
            f"where: expected numbers in {value.words} to compare with a number: {one_line(error)}; put the number in "
            "single quotes to compare text"
        ) from None


def _comparison(sign: str) -> Callable[..., Any]:
    return lambda *values: _COMPARISONS[sign](*_alike(sign, values))


def _arithmetic(sign: str) -> Callable[..., Any]:
    def compute(*values: _Value) -> Any:
        numbers = _require(sign, "a number", _to_numbers(values))

        # Arrow would divide integers without a remainder.
        if sign == "/":
            numbers = [number.cast(pa.float64()) for number in numbers]
        return _ARITHMETIC[sign](*numbers)

    return compute


def _logic(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: function(*_require(name, "true or false", values))


def _between(*values: _Value) -> Any:
    value, low, high = _alike("between", values)
    return pc.and_kleene(pc.greater_equal(value, low), pc.less_equal(value, high))


def _is_in(*values: _Value) -> Any:
    value, *choices = _alike("in", values)
    return reduce(pc.or_kleene, map(partial(pc.equal, value), choices))


def _like(*, ignore_case: bool) -> Callable[..., Any]:
    def compute(value: _Value, pattern: _Value) -> Any:
        text, like = _require("like", "text", [value, pattern])
        return pc.match_like(text, like.as_py(), ignore_case=ignore_case)

    return compute


def _is_null(value: _Value) -> Any:
    return pc.is_null(value.values)


class _Token(NamedTuple):
    kind: str
    word: str
    place: int


def parse_where(expression: str) -> Condition:
    """Parse an expression; see `rows_where`. It raises a `SettingError` if it has another form."""
    return _Parser(expression).parse()


class _Parser:
    """A parser by recursive descent, one method per level of precedence, that emits steps in postfix order."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        if len(expression) > _MAX_LENGTH:
            raise SettingError(f"where: expected at most {_MAX_LENGTH:,} characters, got {len(expression):,}")
        self._tokens = self._split()
        self._place = 0
        self._depth = 0
        self._steps: list[_Step | str | pa.Scalar] = []

    def parse(self) -> Condition:
        self._any_of()
        if self._token.kind != "end":
            raise self._error("an operator or the end")

        # Steps that are strings are names of columns. Each is read once.
        columns = dict.fromkeys(step for step in self._steps if isinstance(step, str))
        return Condition(self._steps, list(columns))

    def _any_of(self) -> None:
        self._all_of()
        while self._accept("or"):
            self._all_of()
            self._emit(_logic("or", pc.or_kleene), 2)

    def _all_of(self) -> None:
        self._negation()
        while self._accept("and"):
            self._negation()
            self._emit(_logic("and", pc.and_kleene), 2)

    def _negation(self) -> None:
        is_negated = False
        while self._accept("not"):
            is_negated = not is_negated
        self._predicate()
        self._negate(is_negated)

    def _predicate(self) -> None:
        self._sum()
        if self._token.word in _COMPARISONS:
            sign = self._next().word
            self._sum()
            self._emit(_comparison(sign), 2)
        elif self._accept("is"):
            is_negated = self._accept("not")
            self._expect("null")
            self._emit(_is_null, 1)
            self._negate(is_negated)
        else:
            # Only in, between and like may follow a not here.
            is_negated = self._accept("not")
            if self._accept("in"):
                self._list()
            elif self._accept("between"):
                self._sum()
                self._expect("and")
                self._sum()
                self._emit(_between, 3)
            elif self._token.word in ("like", "ilike"):
                ignore_case = self._next().word == "ilike"
                if self._token.kind != "text":
                    raise self._error("a pattern in single quotes, such as '%flickr%'")
                self._operand()
                self._emit(_like(ignore_case=ignore_case), 2)
            elif is_negated:
                raise self._error("in, between or like")
            self._negate(is_negated)

    def _list(self) -> None:
        self._expect("(")
        self._sum()
        num_values = 2
        while self._accept(","):
            self._sum()
            num_values += 1
        self._expect(")")
        self._emit(_is_in, num_values)

    def _sum(self) -> None:
        self._product()
        while self._token.word in ("+", "-"):
            sign = self._next().word
            self._product()
            self._emit(_arithmetic(sign), 2)

    def _product(self) -> None:
        self._operand()
        while self._token.word in ("*", "/"):
            sign = self._next().word
            self._operand()
            self._emit(_arithmetic(sign), 2)

    def _operand(self) -> None:
        is_negative = self._accept("-")

        token = self._next()
        if is_negative and token.kind != "number":
            raise self._error("a number after -", token)

        # The depth is limited because each level of parentheses is a recursion of Python.
        if token.word == "(":
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise SettingError(f"where: expected at most {_MAX_DEPTH} nested parentheses, got more")
            self._any_of()
            self._expect(")")
            self._depth -= 1
        elif token.kind == "number":
            sign = -1 if is_negative else 1

            # Longer integers do not fit into int64.
            is_whole = token.word.isdecimal() and len(token.word) < _INT64_DIGITS
            number = pa.scalar(int(token.word), pa.int64()) if is_whole else pa.scalar(float(token.word))
            self._steps.append(pc.multiply(number, sign))
        elif token.kind == "text":
            self._steps.append(pa.scalar(token.word[1:-1].replace("''", "'"), pa.large_string()))
        elif token.kind == "quoted":
            self._steps.append(token.word[1:-1].replace('""', '"'))
        elif token.word in ("true", "false"):
            self._steps.append(pa.scalar(token.word == "true"))
        elif token.kind == "word":
            self._steps.append(token.word)
        else:
            raise self._error("a column, a number or text in single quotes", token)

    def _emit(self, compute: Callable[..., Any], num_values: int) -> None:
        self._steps.append(_Step(compute, num_values))

    def _negate(self, is_negated: bool) -> None:  # noqa: FBT001
        if is_negated:
            self._emit(_logic("not", pc.invert), 1)

    @property
    def _token(self) -> _Token:
        return self._tokens[self._place]

    def _next(self) -> _Token:
        token = self._token
        self._place += token.kind != "end"
        return token

    def _accept(self, word: str) -> bool:
        is_next = self._token.kind in ("keyword", "sign") and self._token.word == word
        self._place += is_next
        return is_next

    def _expect(self, word: str) -> None:
        if not self._accept(word):
            raise self._error(word)

    def _split(self) -> list[_Token]:
        """Split the expression into tokens, the last of which is its end."""
        tokens: list[_Token] = []
        place = 0
        while not tokens or tokens[-1].kind != "end":
            match = _TOKEN.match(self._expression, place)
            if match is None:
                rest = self._expression[place:].lstrip()
                token = _Token("other", rest, len(self._expression) - len(rest))
                raise self._error("columns, numbers, text in single quotes and operators", token)
            kind = str(match.lastgroup)

            # Keywords are words in any case; a column of that name is written in double quotes.
            word = match[kind]
            start = match.start(kind)
            if kind == "word" and word.lower() in _KEYWORDS:
                kind = "keyword"
                word = word.lower()
            tokens.append(_Token(kind, word, start))
            place = match.end()
        return tokens

    def _error(self, expected: str, token: _Token | None = None) -> SettingError:
        token = token or self._token
        rest = self._expression[token.place :]
        got = f"{rest[:20]!r}, character {token.place + 1}" if rest else "the end"
        return SettingError(f"where: expected {expected}, got {got} of {self._expression[:200]!r}")
