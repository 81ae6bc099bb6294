"""Parse and build a folder of models with the RTX library, one JSON line each; run as a script, since it may abort.

Usage: rtx_worker.py FOLDER FIRST: reads ``NNN.onnx`` from FIRST on and ``sms.json``, a list of compute capabilities
per model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt


class Log(trt.ILogger):  # type: ignore[misc]
    """Keep errors; must outlive what is made from it."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(message)


def probe(model: bytes, sms: list[int], builder: Any, log: Log) -> dict[str, Any]:
    """Return whether the model parses and, per compute capability, builds; with the first error of each stage."""
    found: dict[str, Any] = {"parsed": False, "error": "", "built": {}}
    for sm in sms:
        log.errors.clear()
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        if not parser.parse(model) or network.num_layers == 0:
            found["error"] = parser.get_error(0).desc() if parser.num_errors else "nothing parsed"
            return found
        found["parsed"] = True
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        done = builder.build_serialized_network(network, config) is not None
        found["built"][str(sm)] = "" if done else (log.errors or ["no reason given"])[0]
    return found


def main() -> None:
    folder, first = Path(sys.argv[1]), int(sys.argv[2])
    sms = json.loads((folder / "sms.json").read_text())
    log = Log()
    builder = trt.Builder(log)  # one for all: making it takes longer than a small build
    for index in range(first, len(sms)):
        result = probe((folder / f"{index:03d}.onnx").read_bytes(), sms[index], builder, log)
        print(json.dumps({"index": index, **result}), flush=True)


if __name__ == "__main__":
    main()
