"""Transfer learning: pretrained weights, a new head, frozen parts, kept features, learning rates by layer."""
