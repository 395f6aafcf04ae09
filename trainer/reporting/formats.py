"""Numbers as the console shows them: few characters, right-aligned in columns of `NUMBER_WIDTH`.

And another library's error, on one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten

Row = Mapping[str, float]

NUMBER_WIDTH = 8  # characters
GAP = "  "  # on the left of each column
COLUMN_WIDTH = len(GAP) + NUMBER_WIDTH
ABSENT = "–"

MUTED = "dim"
GOOD = "green"
BAD = "bold red"


def column(text: str) -> str:
    """A right-aligned column of numbers, with its gap."""
    return text.rjust(COLUMN_WIDTH)


def format_metric(name: str, value: float) -> str:
    """A metric in at most 8 characters: an accuracy with four decimals, others with their significant digits.

    >>> [format_metric("loss", x) for x in (0.03124, 123.456, 0.000312)]
    ['0.0312', '123.456', '3.1e-04']
    """
    size = abs(value)
    if "accuracy" in name or size == 0 or 1e-3 <= size < 100:
        return f"{value:.4f}"
    if 100 <= size < 1e6:
        return f"{value:.6g}"
    return f"{value:.1e}"


def format_learning_rate(value: float) -> str:
    """A learning rate without trailing zeros.

    >>> [format_learning_rate(x) for x in (0.05, 0.0001, 0.000125, 0.0)]
    ['0.05', '1e-04', '1.25e-04', '0']
    """
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def format_clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any.

    >>> format_clock(75), format_clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{minute}:{second:02d}"


def format_duration(seconds: float) -> str:
    """Seconds with one decimal below a minute, else as `format_clock`."""
    if seconds < 59.95:  # 59.95 would be rounded to "60.0 s"
        return f"{seconds:.1f} s"
    return format_clock(seconds)


def number_style(text: str, default: str = "") -> str:
    """The style of a formatted number: NaN and infinities stand out."""
    if text in ("nan", "inf", "-inf"):
        return BAD
    return default


def shorten_error(error: Exception) -> str:
    """An error's message on one line of at most 200 characters."""
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__
