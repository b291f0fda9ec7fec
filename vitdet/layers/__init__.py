"""Room 1: the parts of a backbone. Torch only."""
