"""How a KV scheme is spelled where several can be named: NAME, or NAME:BITS."""

from __future__ import annotations

from pykvq import native
from pykvq.checks import budget
from pykvq.errors import SchemeError


def parse_kv(spelling: str) -> tuple[native.Scheme, float | None]:
    """The scheme of the core that is meant, and the bits that it shall have.

    Args:
        spelling: "skvq", or of a scheme with a budget also "auto:1.5".

    Returns:
        The scheme, and its bits per element; None where none are given.

    Raises:
        SchemeError: The name is not known, the scheme has no budget, or the bits are no number.
        ValueError: The bits are 0.
    """
    name, colon, bits = spelling.partition(":")
    scheme = native.scheme_named(name)
    if not colon:
        return scheme, None
    if not scheme.has_budget:
        raise SchemeError(
            f"{spelling!r} gives bits to the KV scheme {name}, whose bits are fixed; only schemes"
            " with a budget, such as auto:1.5, take them."
        )
    try:
        number = float(bits)
    except ValueError:
        raise SchemeError(
            f"{spelling!r} gives {bits!r} to the KV scheme {name}, expected a number of bits, as"
            " in auto:1.5."
        ) from None
    return scheme, budget(number)
