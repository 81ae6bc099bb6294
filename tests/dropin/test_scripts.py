"""Scripts as the tutorials of ONNX Runtime are, with only their import line replaced; and crowds of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompiler
from qcompiler.dropin.store import Cache
from tests.dropin.conftest import WIDTH, feeds, small_net, sqnr

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"

CNN = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import onnxruntime as rt

options = rt.SessionOptions()
options.intra_op_num_threads = 1
options.graph_optimization_level = rt.GraphOptimizationLevel.ORT_ENABLE_ALL
sess = rt.InferenceSession("{models}/digits_resnet.onnx", options, providers=rt.get_available_providers())
input_name = sess.get_inputs()[0].name
label_name = sess.get_outputs()[0].name
images = np.load("{models}/digits_resnet_calib.npz")[input_name]
with ThreadPoolExecutor(2) as pool:
    parts = list(pool.map(lambda i: sess.run([label_name], {{input_name: images[i : i + 8]}})[0], range(0, 48, 8)))
np.savez(sys.argv[1], out=np.concatenate(parts))
"""

TRANSFORMER = """
import sys
import threading
import numpy as np
import onnxruntime

class MyData:
    def __init__(self):
        self.event, self.results = threading.Event(), None

def callback(results, user_data, err):
    user_data.results = results
    user_data.event.set()

def main():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession("{models}/code_lm.onnx", options, providers=["CPUExecutionProvider"])
    tokens = np.load("{models}/code_lm_calib.npz")["tokens"]
    outputs = []
    for row in range(0, 4, 2):
        data = MyData()
        session.run_async(["logits"], {{"tokens": tokens[row : row + 2]}}, callback, data)
        data.event.wait()
        outputs.append(data.results[0])
    outputs.append(session.run(None, {{session.get_inputs()[0].name: tokens[4:6]}})[0])
    np.savez(sys.argv[1], out=np.concatenate(outputs))

if __name__ == "__main__":
    main()
"""

STATEFUL = """
import sys
import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("{models}/code_lm_cached.onnx", providers=["CPUExecutionProvider"])
shapes = {{i.name: i.shape for i in session.get_inputs()}}
state = {{n: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, s[1], 0, s[3]), np.float32)) for n, s in shapes.items()
         if n != "tokens"}}
tokens = np.frombuffer(b"def add(a, b):\\n    return", np.uint8).astype(np.int64)[None]
outputs = []
for begin in range(0, tokens.shape[1], 6):
    binding = session.io_binding()
    binding.bind_cpu_input("tokens", tokens[:, begin : begin + 6])
    for name, value in state.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    found = dict(zip([o.name for o in session.get_outputs()], binding.get_outputs()))
    outputs.append(found["logits"].numpy())
    state = {{name: found[name.replace("past", "present")] for name in state}}
np.savez(sys.argv[1], out=np.concatenate(outputs, 1))
"""

SCRIPTS = {"cnn": CNN, "transformer": TRANSFORMER, "stateful": STATEFUL}


def run_script(text: str, folder: Path, name: str, cache: Path, extra: Mapping[str, str] | None = None) -> Any:
    """Run a script in its folder; return (what it saved, what it said on stderr)."""
    (folder / f"{name}.py").write_text(text)
    environment = {**os.environ, "QCOMPILER_CACHE": str(cache), "QCOMPILER_GUARD": "off", **(extra or {})}
    done = subprocess.run(
        [sys.executable, f"{name}.py", f"{name}.npz"], cwd=folder, env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.load(folder / f"{name}.npz")["out"], done.stderr


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_tutorial_runs_compiled_at_its_second_start(name: str, tmp_path: Path, cache: Path) -> None:
    plain = SCRIPTS[name].format(models=MODELS.as_posix())
    replaced = plain.replace("import onnxruntime as", "import qcompiler.ort as").replace(
        "import onnxruntime\n", "import qcompiler.ort as onnxruntime\n"
    )
    assert sum(a != b for a, b in zip(plain.splitlines(), replaced.splitlines(), strict=True)) == 1
    expected, _ = run_script(plain, tmp_path, "plain", cache)
    first, said = run_script(replaced, tmp_path, "first", cache)
    assert said == ""
    assert sqnr(expected, first) > 90  # float as ever, up to the order of sums among threads
    second, said = run_script(replaced, tmp_path, "second", cache)
    assert said in ("", waited(name))
    (entry,) = Cache(cache).entries()
    assert entry.refused == ""
    assert entry.size < 0.4 * sum(p.stat().st_size for p in weights(name))
    assert 20 < sqnr(expected, second) < 60
    again, said = run_script(replaced, tmp_path, "again", cache)
    assert said == ""
    assert sqnr(second, again) > 60
    assert [e.key for e in Cache(cache).entries()] == [entry.key]


def waited(name: str) -> str:
    file = {"cnn": "digits_resnet", "transformer": "code_lm", "stateful": "code_lm_cached"}[name]
    return f"another process compiles {file}.onnx: waiting up to 120 s (QCOMPILER_WAIT)\n"


def weights(name: str) -> list[Path]:
    return [MODELS / "digits_resnet.onnx"] if name == "cnn" else [MODELS / "code_lm.weights"]


CROWD = """
import json, os, sys, threading
import numpy as np
from qcompiler.dropin import building
compile_model = building._compile
def counted(*given):
    with open(sys.argv[2], "a") as file:
        file.write(f"{os.getpid()}\\n")
    return compile_model(*given)
building._compile = counted
from qcompiler.ort import InferenceSession, SessionOptions
told, options = threading.Event(), SessionOptions()
options.intra_op_num_threads = 1
data = np.load("feeds.npz")["x"]
given = {"calibration": "feeds.npz"} if sys.argv[3] == "given" else {"requests": 2, "callback": lambda s: told.set()}
session = InferenceSession("net.onnx", options, ["CPUExecutionProvider"], qcompiler_options=given)
if sys.argv[3] != "given":
    if not session.qcompiler_report.compiled:
        for row in range(2):
            session.run(None, {"x": data[row : row + 1]})
    told.wait()
out = session.run(None, {"x": data})[0]
status = session.qcompiler_report
print(json.dumps({"state": status.state, "sum": float(np.abs(out).sum()), "reason": status.reason}))
"""


@pytest.mark.parametrize("mode", ["given", "self"])
def test_eight_processes_on_a_cold_cache_compile_once(tmp_path: Path, cache: Path, mode: str) -> None:
    onnx.save(small_net(), tmp_path / "net.onnx")
    np.savez(tmp_path / "feeds.npz", x=np.concatenate([f["x"] for f in feeds(4)]))
    (tmp_path / "crowd.py").write_text(CROWD)
    count = tmp_path / "count"
    processes = [
        subprocess.Popen(
            [sys.executable, "crowd.py", "unused", str(count), mode], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(8)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in processes]
    said = [json.loads(out) for out, _ in ended]
    assert [s["state"] for s in said] == ["compiled"] * 8, ended
    assert len({s["sum"] for s in said}) == 1
    (entry,) = Cache(cache).entries()
    if mode == "given":
        assert len(count.read_text().split()) == 1
        offline = qcompiler.compile(tmp_path / "net.onnx", calibration=tmp_path / "feeds.npz", guard=False)
    else:
        assert not count.exists()  # nobody compiled in the process that serves
        data = np.concatenate([f["x"] for f in feeds(4)])
        offline = qcompiler.compile(
            tmp_path / "net.onnx", calibration=[{"x": data[0:1]}, {"x": data[1:2]}], guard=False
        )
    assert (cache / entry.key / "model.onnx").read_bytes() == offline.to_bytes()
    assert not [p for p in cache.iterdir() if p.suffix in (".part", ".trash")]


ABSENT = """
import sys
import numpy as np
import qcompiler.ort as ort
session = ort.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
np.savez(sys.argv[1], out=session.run(None, {"x": np.ones((1, 96), np.float32)})[0])
print(session.qcompiler_report.state, session.qcompiler_report.requests, file=sys.stderr)
"""


def test_waiting_ends_after_its_limit(tmp_path: Path, cache: Path) -> None:
    onnx.save(small_net(), tmp_path / "net.onnx")
    _, said = run_script(ABSENT, tmp_path, "absent", cache, {"QCOMPILER_SWAP": "off"})
    assert said == "collecting 1\n"
    (lock,) = cache.glob("*.lock")
    held = Cache(cache)
    assert held.wait(lock.stem, 60)  # the worker that the script left behind
    held.clear()
    with held.locked(lock.stem, 1):
        _, said = run_script(ABSENT, tmp_path, "absent", cache, {"QCOMPILER_WAIT": "0.2"})
    assert said.splitlines() == [
        "another process compiles net.onnx: waiting up to 0.2 s (QCOMPILER_WAIT)", "collecting 1",
    ]  # fmt: skip


def test_off_loads_nothing_and_writes_nothing(tmp_path: Path, cache: Path) -> None:
    onnx.save(small_net(), tmp_path / "net.onnx")
    _, said = run_script(ABSENT, tmp_path, "absent", cache, {"QCOMPILER_ORT": "off"})
    assert said == "off 0\n"
    assert not cache.exists()


def test_importing_qcompiler_loads_no_engine_and_the_drop_in_no_compiler() -> None:
    code = (
        "import sys, qcompiler\nassert 'onnxruntime' not in sys.modules\nimport qcompiler.ort\n"
        "print(sorted({'onnx', 'onnx_ir', 'scipy', 'networkx', 'qcompiler.api'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_samples_never_have_a_name_in_the_file_system(tmp_path: Path, cache: Path) -> None:
    """Watch the temporary folder from inside, at the moment when the samples lie in their file."""
    onnx.save(small_net(), tmp_path / "net.onnx")
    (tmp_path / "tmp").mkdir()
    text = (
        "import os, sys\nimport numpy as np\nimport qcompiler.ort as ort\nfrom qcompiler.dropin.building import Order\n"
        "write = Order.write\n"
        "def watched(self, calibration, file):\n"
        "    done = write(self, calibration, file)\n"
        "    size, mode = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mode & 0o777\n"
        "    print(size > 4 * 96, oct(mode), file=sys.stderr)\n"
        "    print([n for n in os.listdir(os.environ['TMPDIR']) if 'qcompiler' in n], file=sys.stderr)\n"
        "    return done\n"
        "Order.write = watched\n"
        "session = ort.InferenceSession('net.onnx', providers=['CPUExecutionProvider'])\n"
        "np.savez(sys.argv[1], out=session.run(None, {'x': np.ones((1, 96), np.float32)})[0])\n"
    )
    if os.name != "posix":
        pytest.skip("Windows gives the file a name until it is closed")
    _, said = run_script(text, tmp_path, "watched", cache, {"TMPDIR": str(tmp_path / "tmp")})
    assert said == "True 0o600\n[]\n"
    (lock,) = cache.glob("*.lock")
    assert Cache(cache).wait(lock.stem, 60)
    assert list((tmp_path / "tmp").glob("*qcompiler*")) == []
    assert [e.refused for e in Cache(cache).entries()] == [""]


assert WIDTH == 96  # the scripts say it in their text
