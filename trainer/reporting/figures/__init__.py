"""A run's PNG figures, in one look. Drawn on matplotlib's own objects: no pyplot, no global state, no display."""

from trainer.reporting.figures.images import Predicted, batch_grid, predictions, saliency
from trainer.reporting.figures.plots import confusion_matrix, curves

__all__ = ["Predicted", "batch_grid", "confusion_matrix", "curves", "predictions", "saliency"]
