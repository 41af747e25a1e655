"""Parameter trees by name: flatten, rules that must cover every name, merges that explain themselves."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Tree = Mapping[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, in the order of the tree."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, name + "/") if isinstance(value, Mapping) else {name: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dict: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def match(rules: Iterable[tuple[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """The value of the first rule whose pattern is found in each name.

    rules: (regular expression, value) pairs, most specific first.
    Raises ValueError that lists the names no rule matches: a parameter nobody thought of is an error.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    found, missed = {}, []
    for name in names:
        hits = (value for pattern, value in compiled if pattern.search(name))
        value = next(hits, missed)
        if value is missed:
            missed.append(name)
        else:
            found[name] = value
    if missed:
        raise ValueError(
            f"no rule covers {len(missed)} parameters: {', '.join(missed[:10])}"
            f"{', ...' if len(missed) > 10 else ''}; the patterns are "
            + ", ".join(repr(pattern) for pattern, _ in rules)
        )
    return found


def merge(expected: Tree, given: Tree, what: str, optional: Iterable[str] = ()) -> dict[str, Any]:
    """`given` in the form of `expected`: same names, same shapes, dtype of `expected`.

    what: how the error names the origin of `given`, e.g. a path.
    optional: patterns of names that keep the value of `expected` where `given` has none.
    Raises ValueError with the names only one side has and the shapes that differ.
    """
    ours, theirs = flatten(expected), flatten(given)
    skip = [re.compile(pattern) for pattern in optional]
    missing = [n for n in ours if n not in theirs and not any(p.search(n) for p in skip)]
    extra = [n for n in theirs if n not in ours]
    shapes = [
        f"{n}: expected {tuple(np.shape(ours[n]))}, found {tuple(np.shape(theirs[n]))}"
        for n in ours
        if n in theirs and np.shape(ours[n]) != np.shape(theirs[n])
    ]
    if missing or extra or shapes:
        parts = [("missing", missing), ("not expected", extra), ("of another shape", shapes)]
        lines = [f"  {label} ({len(names)}): {'; '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
                 for label, names in parts if names]
        raise ValueError(f"{what} does not fit this model:\n" + "\n".join(lines))
    return unflatten({n: _cast(theirs.get(n, value), value) for n, value in ours.items()})


def _cast(value, like):
    return value if value.dtype == like.dtype else value.astype(like.dtype)


def count(tree: Tree) -> int:
    """Number of scalars in the tree."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in flatten(tree).values())
