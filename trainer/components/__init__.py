"""What a config names: models, tasks, optimizers, schedules, and what adapts a pretrained network."""
