"""A complete small project outside the package: find discs in noisy images. See docs/bring-your-own.md."""
