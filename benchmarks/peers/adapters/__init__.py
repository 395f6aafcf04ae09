"""One file for each trainer. Its `train(job)` trains as the trainer's own guide shows, and never returns early."""
