"""Before training: does this run's own model, loss, data and optimizer keep the promise?"""
