"""What a field of `conf.schema` knows about itself: documentation, bounds, and when it has an effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TypeVar

T = TypeVar("T")

FROM_0, FROM_1, ABOVE_0 = "[0,inf)", "[1,inf)", "(0,inf)"
SET = "set"
"""Among the values of `option(needs=...)`: anything but None."""


def option(
    default: T,
    doc: str,
    within: str = "",
    *,
    needs: tuple[str, tuple[object, ...]] | None = None,
    only: tuple[str, ...] = (),
    secret: bool = False,
    later: bool = False,
) -> T:
    """A dataclass field with a default and its documentation.

    Args:
        default: the value when nobody sets it.
        doc: one line for `--help`, with the unit.
        within: the interval a number (each number of a list) lies in, as `[0,1)` or `[1,inf)`.
        needs: (sibling, values): the option has an effect only while the sibling field has one of the values;
            SET means any value but None.
        only: the commands that read the option; empty = all.
        secret: never printed or saved.
        later: the option is planned; any value but the default is refused.
    """
    about = {"doc": doc, "within": within, "needs": needs, "only": only, "secret": secret, "later": later}
    return field(default=default, metadata=about)


def about(doc: str, within: str = "", *, only: tuple[str, ...] = ()) -> Mapping[str, object]:
    """Metadata of a field that has no default, or a factory for it; the arguments are `option`'s."""
    return {"doc": doc, "within": within, "only": only}
