"""One table of rules per weights format, applied either way.

A rule names a foreign parameter (or several that make one of ours), our parameter and how the array changes:

    Rule("blocks.{i}.attn.qkv.weight", "blocks_{i}/attn/qkv/kernel", LINEAR)
    Rule(("q.{i}.weight", "k.{i}.weight", "v.{i}.weight"), "blocks_{i}/attn/qkv/kernel", LINEAR)

`{i}` stands for the same number on both sides. Several foreign arrays are stacked along their first axis, in
the order given. Every name must be matched by exactly one rule, in either direction.
"""

import collections
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


class WeightsError(ValueError):
    """Weights that cannot be taken over; the message is for a person and names the file."""


@dataclass(frozen=True)
class Transform:
    """How an array changes: `read` foreign -> ours, `write` back."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _same(x):
    return x


SAME = Transform(_same, _same)
LINEAR = Transform(np.transpose, np.transpose)  # torch [out, in] <-> flax [in, out]
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINT = Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # a 1 x 1 convolution <-> a Dense
ONE = Transform(lambda x: x[None], lambda x: x[0])  # [T, D] <-> [1, T, D]
ONE_ONE = Transform(lambda x: x[None, None], lambda x: x[0, 0])  # [D] <-> [1, 1, D]
CHANNELS = Transform(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1))  # [1, D, 1, 1] <-> [D]


@dataclass(frozen=True)
class Rule:
    """theirs: one foreign name or several to stack. ours: our name. See the module's docstring."""

    theirs: str | tuple[str, ...]
    ours: str
    transform: Transform = SAME

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def read(rules: Sequence[Rule], foreign: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    """Foreign arrays by name -> ours by name ("blocks_0/attn/qkv/kernel").

    what: how errors name the source. Raises WeightsError that lists names matched by no rule or by several
    rules, rules of which only some parts are there, and parameters of ours that two of theirs would fill.
    """
    found: dict[tuple[Rule, str], dict[int, np.ndarray]] = {}
    problems = []
    for name, value in foreign.items():
        hits = [
            (rule, part, index)
            for rule in rules
            for part, text in enumerate(rule.parts)
            if (index := _match(text, name)) is not None
        ]
        if len(hits) != 1:
            problems.append(f"{name} {tuple(np.shape(value))}: matched by {len(hits)} rules")
            continue
        rule, part, index = hits[0]
        found.setdefault((rule, index), {})[part] = value
    for (rule, index), parts in found.items():
        lacking = [_fill(text, index) for part, text in enumerate(rule.parts) if part not in parts]
        problems += [f"{name}: missing" for name in lacking]
    times = collections.Counter(_fill(rule.ours, index) for rule, index in found)
    problems += [f"{name}: given {n} times, in different spellings" for name, n in times.items() if n > 1]
    if problems:
        raise WeightsError(_complain(what, problems))
    return {_fill(rule.ours, index): _join(rule, parts) for (rule, index), parts in found.items()}


def write(rules: Sequence[Rule], ours: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    """Our arrays by name -> foreign ones: the inverse of `read`, contiguous, with the same errors."""
    foreign, problems = {}, []
    for name, value in ours.items():
        hits = [(rule, index) for rule in rules if (index := _match(rule.ours, name)) is not None]
        if len(hits) != 1:
            problems.append(f"{name} {tuple(np.shape(value))}: matched by {len(hits)} rules")
            continue
        rule, index = hits[0]
        pieces = np.split(rule.transform.write(np.asarray(value)), len(rule.parts), axis=0)
        for text, piece in zip(rule.parts, pieces, strict=True):
            foreign[_fill(text, index)] = np.ascontiguousarray(piece)
    if problems:
        raise WeightsError(_complain(what, problems))
    return foreign


def _match(text: str, name: str) -> str | None:
    """The number that `{i}` stands for ("" where there is none), or None."""
    hit = _pattern(text).fullmatch(name)
    return None if hit is None else hit.groupdict().get("i", "")


@functools.cache
def _pattern(text: str) -> re.Pattern:
    return re.compile(re.escape(text).replace(r"\{i\}", r"(?P<i>\d+)"))


def _fill(text: str, index: str) -> str:
    return text.replace("{i}", index)


def _join(rule: Rule, parts: Mapping[int, np.ndarray]) -> np.ndarray:
    arrays = [np.asarray(parts[i]) for i in range(len(rule.parts))]
    return rule.transform.read(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=0))


def _complain(what: str, problems: Sequence[str]) -> str:
    shown = "\n".join(f"  {line}" for line in problems[:12])
    more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
    return f"{what}: {len(problems)} parameters do not fit the format:\n{shown}{more}"


def unchunk(foreign: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of chunked blocks ("blocks.1.7.attn...") without the chunk ("blocks.7.attn...")."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): v for name, v in foreign.items()}
