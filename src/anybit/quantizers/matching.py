"""Module names against patterns that come from files: regular expressions, but never exponential or polynomial in time.

A pattern with at most two unbounded repeats, not nested, is safe for `re`: its time is at most cubic in a name's length.
Everything else runs on a matcher that keeps the set of positions reached, as an automaton does, under a step budget.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from anybit.errors import InvalidOption

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        from re import _constants as _codes  # type: ignore[attr-defined]
        from re import _parser  # type: ignore[attr-defined]
    except ImportError:  # Python 3.10
        import sre_constants as _codes
        import sre_parse as _parser

LIMIT_PATTERN = 2048
LIMIT_NAME = 1024
LIMIT_STEPS = 500_000
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def should_convert_module(full_name: str, patterns: Iterable[str] | None = None) -> bool:
    """False when a pattern names the module: as a regular expression from its start up to a dot or the end, or as a suffix."""
    return patterns is None or matching_pattern(full_name, patterns) is None


def matching_pattern(full_name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that `should_convert_module` would skip the module for."""
    for pattern in patterns:
        if full_name.endswith(pattern) or compiled(pattern).starts(full_name, boundary=True):
            return pattern
    return None


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> SafePattern:
    """A pattern, compiled once. InvalidOption when it is no regular expression or too long."""
    return SafePattern(pattern)


class SafePattern:
    """A regular expression whose matching time is bounded."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        if len(pattern) > LIMIT_PATTERN:
            raise InvalidOption(
                f"a module pattern has {len(pattern)} characters, more than {LIMIT_PATTERN}: {pattern[:60]!r}..."
            )
        try:
            self._tree = _parser.parse(pattern)
            self._plain = _is_safe(self._tree)
            self._re = re.compile(f"(?:{pattern})") if self._plain else None
            self._re_boundary = re.compile(f"(?:{pattern}){BOUNDARY}") if self._plain else None
        except (re.error, OverflowError, RecursionError) as error:
            raise InvalidOption(f"module pattern {pattern!r} is not a valid regular expression: {error}") from error

    def starts(self, text: str, boundary: bool = False) -> bool:
        """Like `re.match`; with `boundary`, the match must end at a dot or at the end of the name."""
        if self._re is not None and self._re_boundary is not None:
            return (self._re_boundary if boundary else self._re).match(text[:LIMIT_NAME]) is not None
        ends = _Run(self.pattern, text, self._tree.state.flags).ends(self._tree, {0})
        return any(not boundary or end == len(text) or "." in text[max(end - 1, 0) : end + 1] for end in ends)

    def searches(self, text: str) -> bool:
        """Like `re.search`."""
        if self._re is not None:
            return self._re.search(text[:LIMIT_NAME]) is not None
        return bool(_Run(self.pattern, text, self._tree.state.flags).ends(self._tree, set(range(len(text) + 1))))

    def covers(self, text: str) -> bool:
        """Like `re.fullmatch`."""
        if self._re is not None:
            return self._re.fullmatch(text[:LIMIT_NAME]) is not None
        return len(text) in _Run(self.pattern, text, self._tree.state.flags).ends(self._tree, {0})


def _is_safe(tree: Any) -> bool:
    return _repeats(tree) is not None and _repeats(tree) <= 2  # type: ignore[operator]


def _repeats(tree: Any) -> int | None:
    """Number of unbounded (or long) repeats; None when one contains another."""
    total = 0
    for code, argument in tree:
        inner = 0
        for child in _subtrees(argument):
            found = _repeats(child)
            if found is None:
                return None
            inner += found
        if code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT) and argument[1] > 1:
            if inner:
                return None
            inner = 1
        total += inner
    return total


def _subtrees(argument: Any) -> list[Any]:
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, (tuple, list)):
        return [tree for part in argument for tree in _subtrees(part)]
    return []


class _Run:
    """One match of one text: every node maps a set of start positions to the set of end positions."""

    def __init__(self, pattern: str, text: str, flags: int):
        if len(text) > LIMIT_NAME:
            raise InvalidOption(f"a module name has {len(text)} characters, more than {LIMIT_NAME}: {text[:60]!r}...")
        self.pattern, self.text, self.flags, self.steps = pattern, text, flags, 0

    def ends(self, nodes: Sequence[Any], positions: set[int]) -> set[int]:
        for code, argument in nodes:
            if not positions:
                break
            self.steps += len(positions)
            if self.steps > LIMIT_STEPS:
                raise InvalidOption(
                    f"module pattern {self.pattern!r} takes too long on {self.text!r}; write it with fewer repeats"
                )
            positions = self.step(code, argument, positions)
        return positions

    def step(self, code: Any, argument: Any, positions: set[int]) -> set[int]:
        if code in (_codes.LITERAL, _codes.NOT_LITERAL, _codes.ANY, _codes.IN):
            test = _character_test(str(code), repr(argument), code, argument, self.flags)
            return {at + 1 for at in positions if at < len(self.text) and test.match(self.text[at])}
        if code is _codes.BRANCH:
            return set().union(*(self.ends(branch, positions) for branch in argument[1]))
        if code is _codes.SUBPATTERN:
            return self.ends(argument[3], positions)
        if code is getattr(_codes, "ATOMIC_GROUP", None):
            return self.ends(argument, positions)
        if code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT):
            least, most, inner = argument
            return self.repeat(least, most, inner, positions)
        if code is _codes.AT:
            return {at for at in positions if self.is_at(argument, at)}
        if code in (_codes.ASSERT, _codes.ASSERT_NOT):
            direction, nodes = argument
            wanted = code is _codes.ASSERT
            return {at for at in positions if self.looks(direction, nodes, at) == wanted}
        raise InvalidOption(
            f"module pattern {self.pattern!r} uses {str(code).lower()}, which is not allowed in a file; rewrite it"
        )

    def repeat(self, least: int, most: Any, nodes: Any, positions: set[int]) -> set[int]:
        count = 0
        while count < least and positions:
            after = self.ends(nodes, positions)
            count = least if after == positions else count + 1
            positions = after
        reached, fresh = set(positions), positions
        limit = len(self.text) + 1 if most is _codes.MAXREPEAT else int(most) - least
        while fresh and limit > 0:
            fresh = self.ends(nodes, fresh) - reached
            reached |= fresh
            limit -= 1
        return reached

    def looks(self, direction: int, nodes: Any, at: int) -> bool:
        if direction > 0:
            return bool(self.ends(nodes, {at}))
        width = nodes.getwidth()[0]
        return at >= width and at in self.ends(nodes, {at - width})

    def is_at(self, where: Any, at: int) -> bool:
        if where in (_codes.AT_BEGINNING, _codes.AT_BEGINNING_STRING):
            return at == 0
        if where in (_codes.AT_END, _codes.AT_END_STRING):
            return at == len(self.text)
        left, right = (
            bool(re.match(r"\w", self.text[index : index + 1] if index >= 0 else "")) for index in (at - 1, at)
        )
        return (left != right) == (where is _codes.AT_BOUNDARY)


@functools.lru_cache(maxsize=1024)
def _character_test_cached(code: str, argument: str, source: str, flags: int) -> re.Pattern[str]:
    return re.compile(source, flags & (re.IGNORECASE | re.ASCII | re.DOTALL))


def _character_test(code: str, key: str, kind: Any, argument: Any, flags: int) -> re.Pattern[str]:
    return _character_test_cached(code, key, _source(kind, argument), flags)


def _source(kind: Any, argument: Any) -> str:
    """A one-character node, written as a regular expression again."""
    if kind is _codes.ANY:
        return "."
    if kind is _codes.LITERAL:
        return re.escape(chr(argument))
    if kind is _codes.NOT_LITERAL:
        return f"[^{_escaped(argument)}]"
    classes = {
        _codes.CATEGORY_DIGIT: r"\d", _codes.CATEGORY_NOT_DIGIT: r"\D", _codes.CATEGORY_SPACE: r"\s",
        _codes.CATEGORY_NOT_SPACE: r"\S", _codes.CATEGORY_WORD: r"\w", _codes.CATEGORY_NOT_WORD: r"\W",
    }  # fmt: skip
    parts = []
    for code, value in argument:
        if code is _codes.NEGATE:
            parts.append("^")
        elif code is _codes.LITERAL:
            parts.append(_escaped(value))
        elif code is _codes.RANGE:
            parts.append(f"{_escaped(value[0])}-{_escaped(value[1])}")
        else:
            parts.append(classes[value])
    return f"[{''.join(parts)}]"


def _escaped(character: int) -> str:
    return f"\\U{character:08x}"
