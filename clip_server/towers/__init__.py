"""ONNX graphs of the towers, built from a checkpoint without torch."""
