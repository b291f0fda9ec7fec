"""Room 4: training and evaluation. `run.train` and `run.evaluate` are the doors."""
