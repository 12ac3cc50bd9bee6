"""The names of the tasks, and one way to refuse a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Collection

TASKS = ("ivif", "mfif", "meif", "mif")


def check_task(task: str) -> str:
    """`task` itself, if it is one of `TASKS`; else a ValueError that lists them."""
    return check_name(task, TASKS, "task")


def check_name(name: str, known: Collection[str], kind: str) -> str:
    """`name` itself, if it is among the `known`; else a ValueError that suggests the nearest."""
    if name in known:
        return name
    alike = str(name).lower().replace("-", "_")
    close = difflib.get_close_matches(alike, list(known), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown {kind} {name!r}{hint}; expected one of {', '.join(known)}")
