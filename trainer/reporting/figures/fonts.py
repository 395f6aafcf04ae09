"""Fonts for text that the default font cannot write, such as class names in another script."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Matplotlib's own last font: it has a box for every character.
PLACEHOLDER = "Last Resort"


def use_fonts_that_can_write(figure: Figure) -> None:
    """Add to each text's fonts those of this machine that have the characters which the default one lacks.

    A character that no font has is drawn as a box.
    """
    from matplotlib.text import Text

    texts: list[Text] = []
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not text.get_text().isascii():
            texts.append(text)
    characters = frozenset("".join(text.get_text() for text in texts))
    families = _families_beside_the_default(characters) if texts else ()
    if families:
        for text in texts:
            text.set_fontfamily([*text.get_fontfamily(), *families])


@lru_cache
def _families_beside_the_default(characters: frozenset[str]) -> tuple[str, ...]:
    """The families that together have the characters that the default font lacks, as far as any has them."""
    from matplotlib import font_manager

    default = font_manager.findfont(font_manager.FontProperties())
    missing = _missing_in(default, map(ord, characters))
    families: list[str] = []
    for font in font_manager.fontManager.ttflist:
        if not missing:
            break
        if font.name.startswith(PLACEHOLDER):
            continue
        still_missing = _missing_in(font.fname, missing)
        if len(still_missing) < len(missing):
            families.append(font.name)
            missing = still_missing
    return tuple(dict.fromkeys(families))


def _missing_in(path: str, characters: Iterable[int]) -> set[int]:
    from matplotlib.font_manager import get_font

    try:
        return set(characters) - set(get_font(path).get_charmap())
    except (OSError, RuntimeError):
        # Matplotlib's list of fonts may be older than what is on the disk.
        return set(characters)
