"""Trackers beside W&B: TensorBoard, MLflow, trackio, CSV, any of Accelerate's, or a class of one's own."""
