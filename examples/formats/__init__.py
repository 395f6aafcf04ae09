"""Data in formats that are mostly streamed, read by number. See docs/map-style.md."""
