"""What the CPU has decoded in an epoch of `data.decode=device`, in a line on the console."""

from __future__ import annotations

from trainer.core.run import Run
from trainer.data.device_decoding import DecodedImages, total


class DecodingNotes:
    """A note after each epoch whose images the device did not all decode, unless the epoch before had the same."""

    def __init__(self, run: Run) -> None:
        self._ranks = run.ranks
        self._loader = run.train_loader
        self._last = DecodedImages()

    def take_note(self, epoch: int) -> str:
        """The note on `epoch` (0-based), "" if there is none. A collective where the device decodes."""
        if not self._loader.dataset.reads_files:
            return ""
        own = self._loader.train_decoding.take_decoded(epoch)
        decoded = total(self._ranks.gather([own]))
        is_new = decoded[1:] != self._last[1:]
        self._last = decoded
        if not is_new or not any(decoded[1:]):
            return ""
        return f"epoch {epoch + 1}: {_describe(decoded)} (docs/on-device.md)"


def _describe(decoded: DecodedImages) -> str:
    kinds = []
    if decoded.not_given:
        kinds.append(f"{decoded.not_given:,} are of kinds that it is not given")
    if decoded.refused:
        kinds.append(
            f"{decoded.refused:,} are JPEG files that it refused, decoded while training waited"
        )
    count = decoded.not_given + decoded.refused
    return f"of {decoded.images:,} images the device did not decode {count:,}: {', '.join(kinds)}"
