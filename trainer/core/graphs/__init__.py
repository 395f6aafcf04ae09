"""`train.cuda_graphs`: micro-batches that are recorded once and then replayed, with the bits of eager."""
