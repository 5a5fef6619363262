"""Interactive debugger and visual inspector for quantized ONNX models."""
