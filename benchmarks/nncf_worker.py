"""Quantize one model with NNCF, in the environment that has it: model, folder of feeds, mode, output.

Needs nncf and onnx, and nothing of this project.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main() -> None:
    """Read the model and every feed (one .npz each), and write what NNCF makes of them."""
    import nncf
    import onnx

    model, folder, mode, output = sys.argv[1:]
    feeds = []
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path) as stored:
            feeds.append({name: stored[name] for name in stored.files})
    kind = nncf.ModelType.TRANSFORMER if mode == "transformer" else None
    made = nncf.quantize(onnx.load(model), nncf.Dataset(feeds), subset_size=min(300, len(feeds)), model_type=kind)
    onnx.save(made, output)


if __name__ == "__main__":
    main()
