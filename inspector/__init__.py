"""Interactive debugger and visual inspector for quantized ONNX models."""

import os

# Models are their owners' business: from version 1.31 on, ONNX Runtime reports what it runs to its
# makers and keeps a device id in the home folder, unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
