"""Take the pictures of the viewer's page for the tutorial: ``python -m docs.generator.screenshots``; needs Chromium."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.report.browser import open_browser

ROOT = Path(__file__).resolve().parents[2]
MODEL = "examples/models/digits_resnet"
PICTURE = ROOT / "docs" / "images" / "viewer.png"


def main() -> None:
    """Compile the demo model, open its dump, choose a node and take the picture."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        page = work / "dump.html"
        for command in (
            ("compile", f"{MODEL}.onnx", "-o", work / "out.onnx", "--calibration", f"{MODEL}_calib.npz", "--no-guard",
             "--quiet", "--dump", work / "dump"),
            ("inspect", work / "dump", "--html", page),
        ):  # fmt: skip
            subprocess.run([sys.executable, "-m", "qcompiler", *map(str, command)], cwd=ROOT, check=True)
        with open_browser(work / "profile") as tab:
            tab.open(page, width=1280, height=760)
            for key in ("/",):
                tab.press(key)
            tab.type("block2.Add")
            tab.press("Enter")
            tab.press("Escape")
            tab.screenshot(PICTURE)
    _shrink(PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size} bytes")


def _shrink(picture: Path) -> None:
    """Keep 128 colours: the page has few, and a small file is welcome."""
    from PIL import Image

    with Image.open(picture) as opened:
        small = opened.convert("RGB").quantize(128)
    small.save(picture, optimize=True)


if __name__ == "__main__":
    main()
