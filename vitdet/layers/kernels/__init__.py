"""Kernels of `vitdet.layers.attention`: one file each, all with the signature of `eager.py`."""
