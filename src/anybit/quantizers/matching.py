"""Module names against patterns that come from files: regular expressions, but never exponential in time.

A pattern with at most two repeats, each of a run of fixed length, and few alternatives is safe for `re`: its time is at most
cubic in a name's length. Everything else runs on a matcher that keeps the set of positions reached, as an automaton does,
under a step budget.
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
LIMIT_CHOICES = (1000, 1000, 8)  # ways through the alternatives, by number of repeats
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
LEADING_FLAGS = re.compile(r"\(\?[ims]+\)")


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
            flags = self._tree.state.flags
            inner = LEADING_FLAGS.sub("", pattern, count=1) if LEADING_FLAGS.match(pattern) else pattern
            plain = _is_safe(self._tree) and not flags & re.VERBOSE
            self._re = re.compile(f"(?:{inner})", flags) if plain else None
            self._re_boundary = re.compile(f"(?:{inner}){BOUNDARY}", flags) if plain else None
        except (re.error, OverflowError, RecursionError) as error:
            raise InvalidOption(f"module pattern {pattern!r} is not a valid regular expression: {error}") from error

    def starts(self, text: str, boundary: bool = False) -> bool:
        """Like `re.match`; with `boundary`, the match must end at a dot or at the end of the name."""
        _check_length(text)
        if self._re is not None and self._re_boundary is not None:
            return (self._re_boundary if boundary else self._re).match(text) is not None
        ends = self._ends(text, {0})
        return any(not boundary or end == len(text) or "." in text[max(end - 1, 0) : end + 1] for end in ends)

    def searches(self, text: str) -> bool:
        """Like `re.search`."""
        _check_length(text)
        if self._re is not None:
            return self._re.search(text) is not None
        return bool(self._ends(text, set(range(len(text) + 1))))

    def first(self, text: str) -> int | None:
        """Where `re.search` finds the pattern, or None."""
        _check_length(text)
        if self._re is not None:
            found = self._re.search(text)
            return None if found is None else found.start()
        return next((start for start in range(len(text) + 1) if self._ends(text, {start})), None)

    def covers(self, text: str) -> bool:
        """Like `re.fullmatch`."""
        _check_length(text)
        return self._re.fullmatch(text) is not None if self._re is not None else len(text) in self._ends(text, {0})

    def _ends(self, text: str, starts: set[int]) -> set[int]:
        return _Run(self.pattern, text, self._tree.state.flags).ends(self._tree, starts)


def _check_length(text: str) -> None:
    if len(text) > LIMIT_NAME:
        raise InvalidOption(f"a module name has {len(text)} characters, more than {LIMIT_NAME}: {text[:60]!r}...")


def _is_safe(tree: Any) -> bool:
    """Whether backtracking through the pattern stays cheap."""
    weight = _weigh(tree)
    return weight is not None and weight[0] < len(LIMIT_CHOICES) and weight[1] <= LIMIT_CHOICES[weight[0]]


def _weigh(tree: Any) -> tuple[int, int] | None:
    """(repeats, ways through the alternatives); None when a repeat's body could be cut up in several ways."""
    repeats, choices = 0, 1
    for code, argument in tree:
        inner = [_weigh(child) for child in _subtrees(argument)]
        if None in inner:
            return None
        repeats += sum(weight[0] for weight in inner if weight is not None)
        ways = [weight[1] for weight in inner if weight is not None]
        if code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT):
            least, most, body = argument
            if most > 1 and not _has_fixed_length(body):
                return None
            repeats += int(most > 1 and least != most)
            choices *= 1 + ways[0] if most <= 1 else 1
        else:
            choices *= max(sum(ways), 1)
        if choices > LIMIT_CHOICES[0]:
            return None
    return repeats, choices


def _has_fixed_length(tree: Any) -> bool:
    """Whether the node is a run of single characters."""
    single = (_codes.LITERAL, _codes.NOT_LITERAL, _codes.ANY, _codes.IN)
    return (
        all(code in single or (code is _codes.SUBPATTERN and _has_fixed_length(argument[3])) for code, argument in tree)
        and len(tree) > 0
    )


def _subtrees(argument: Any) -> list[Any]:
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, (tuple, list)):
        return [tree for part in argument for tree in _subtrees(part)]
    return []


class _Run:
    """One match of one text: every node maps a set of start positions to the set of end positions."""

    def __init__(self, pattern: str, text: str, flags: int):
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
            _, added, removed, nodes = argument
            before, self.flags = self.flags, (self.flags | added) & ~removed
            reached = self.ends(nodes, positions)
            self.flags = before
            return reached
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
