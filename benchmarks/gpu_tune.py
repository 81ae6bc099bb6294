"""Time candidates of `qcompiler tune compile` on a bare machine: torch and Triton, the checkout need not be installed.

``python benchmarks/gpu_tune.py candidates --out kernels-h200 --total 500`` does what ``qcompiler tune time`` does, and
stops when ``--total`` seconds are spent; a second run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkout import use_checkout

use_checkout()


def main() -> int:
    """Run the command; exit with 2 where there is no GPU or there are no candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", type=Path, help="folder that tune compile wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables to write")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for each shape")
    parser.add_argument("--total", type=float, default=500.0, help="seconds for all shapes")
    parser.add_argument("--again", action="store_true", help="also what the tables have")
    chosen = parser.parse_args()
    from qcompiler.backends.triton.stopwatch import GpuTimer
    from qcompiler.errors import TargetError
    from qcompiler.kernels.tuning.compiling import read_folder
    from qcompiler.kernels.tuning.timing import time_all

    try:
        sets = read_folder(chosen.candidates)
        timer = GpuTimer.open()
        end = timer.seconds() + chosen.total
        for each in sets:
            if timer.seconds() >= end:
                print("out of time; run it again to go on", flush=True)
                break
            for r in time_all([each], timer, chosen.out, chosen.budget, again=chosen.again):
                best = f"{r.best.config} {r.best.median:.2f} us (spread {r.best.spread:.1%})"
                print(f"{r.work.kernel} {r.work.shape}: {best}, {r.gain:.3f}x, {len(r.failed)} failed", flush=True)
    except TargetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
