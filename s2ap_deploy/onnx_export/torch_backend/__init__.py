"""Differentiable twins of ONNX files."""
