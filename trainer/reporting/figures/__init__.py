"""A run's figures as PNG files, all in one style.

`drawing` decides what to draw of a run; `curves`, `confusion` and `images` draw it, in the colours of `style`.
They use matplotlib's objects directly: no pyplot, no global state, no display.
"""
