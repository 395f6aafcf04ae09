"""The promise: plan, seeding, reduction of gradients and statistics, BatchNorm, fuse, determinism."""
