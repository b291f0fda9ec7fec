"""A trained detector as an ONNX file, written only if it finds what PyTorch finds."""
