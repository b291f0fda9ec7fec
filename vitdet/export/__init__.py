"""Trained detectors as files for other runtimes, each checked against PyTorch."""
