"""The look of the lessons' pictures, that of a run's own figures."""

from __future__ import annotations

# Blue and vermilion of Okabe and Ito's palette (2008): distinct in any colour vision, and in greyscale.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, GREY, FAINT = "#262626", "#767676", "#E4E4E4"
TITLE, SMALL = 10, 8  # font sizes, in points
DPI = 144
