"""Train a small byte-level decoder on the Python standard library's source and export it to ONNX, twice.

Run `python examples/train_code_lm.py`; it writes `code_lm.onnx` (tokens to logits) and `code_lm_cached.onnx` (a step
of tokens and the past keys and values to logits and the present ones) into `examples/models`, both over the one
`code_lm.weights`, and their calibration and evaluation data. Needs torch, onnxscript and onnxruntime.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from onnx_export import export_traced, save
from torch import Tensor, nn

Feeds = dict[str, npt.NDArray[np.float32 | np.int64]]

MODELS = Path(__file__).resolve().parent / "models"
SEED = 20240
VOCABULARY = 256
WIDTH = 256
HIDDEN = 512
HEADS = 4
LAYERS = 4
HEAD_WIDTH = WIDTH // HEADS
ROTARY_BASE = 10000.0
MASKED = -1e4
LEFT_OUT = frozenset({"site-packages", "test", "tests", "encodings", "pydoc_data"})
STEPS = 3500
BATCH = 32
CONTEXT = 128
WARMUP = 100
RATE = 6e-3
PAST = 16
LENGTH = 64


class Dense(nn.Module):
    """Multiply by a weight kept as `[inputs, outputs]`, so that the export is one MatMul without a Transpose."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * gain / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 `[..., inputs]` to `[..., outputs]`."""
        return x @ self.weight


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, times a learned weight (Zhang and Sennrich, 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 `[batch, time, WIDTH]` to the same shape."""
        root_mean_square = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x / root_mean_square * self.weight


class Attention(nn.Module):
    """Attend causally with rotary positions (Su et al., 2021), written out: MatMul, mask, Softmax, MatMul."""

    def __init__(self) -> None:
        super().__init__()
        self.query = Dense(WIDTH, WIDTH)
        self.key = Dense(WIDTH, WIDTH)
        self.value = Dense(WIDTH, WIDTH)
        self.out = Dense(WIDTH, WIDTH, 1 / math.sqrt(2 * LAYERS))

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the update of `x` `[batch, step, WIDTH]` and the present keys and values.

        Keys and values are `[batch, HEADS, time, HEAD_WIDTH]`, the keys already rotated; `rotation` holds cosines
        and sines `[step, HEAD_WIDTH]`, `mask` is added to the scores, `[step, time]`.
        """
        query = rotate(split_heads(self.query(x)), rotation)
        key = rotate(split_heads(self.key(x)), rotation)
        value = split_heads(self.value(x))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        scores = query @ key.transpose(2, 3) * HEAD_WIDTH**-0.5 + mask
        mixed = torch.softmax(scores, -1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2)), (key, value)


class SwiGLU(nn.Module):
    """Gate one projection with the SiLU of another, then project back (Shazeer, 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Dense(WIDTH, HIDDEN)
        self.up = Dense(WIDTH, HIDDEN)
        self.down = Dense(HIDDEN, WIDTH, 1 / math.sqrt(2 * LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 `[batch, time, WIDTH]` to the same shape."""
        gate = self.gate(x)
        update: Tensor = self.down(gate * torch.sigmoid(gate) * self.up(x))
        return update


class Layer(nn.Module):
    """Add attention, then the gated MLP, to the residual stream, each behind its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = RMSNorm()
        self.attention = Attention()
        self.mlp_norm = RMSNorm()
        self.mlp = SwiGLU()

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the new residual stream `[batch, step, WIDTH]` and the present keys and values."""
        update, present = self.attention(self.attention_norm(x), rotation, mask, past)
        x = x + update
        return x + self.mlp(self.mlp_norm(x)), present


class CodeLM(nn.Module):
    """Predict the next byte of source text."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm()
        self.head = Dense(WIDTH, VOCABULARY, 0.5)
        exponents = torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH
        self.register_buffer("frequencies", (ROTARY_BASE**-exponents).repeat(2))

    def forward(self, tokens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map int64 tokens `[batch, step]` to float32 logits `[batch, step, VOCABULARY]`, then the present caches.

        `past` is empty, or `past_key_0, past_value_0, past_key_1, ...`, each `[batch, HEADS, past, HEAD_WIDTH]`;
        the present ones come in the same order with `past + step` positions.
        """
        known = past[0].shape[2] if past else 0
        total = known + tokens.shape[1]
        key_position = torch.arange(total, device=tokens.device)
        query_position = key_position[known:] if past else key_position
        angles = query_position.to(torch.float32)[:, None] * self.frequencies
        rotation = (angles.cos(), angles.sin())
        mask = (key_position > query_position[:, None]).to(torch.float32) * MASKED
        x = self.embedding(tokens)
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            cache = (past[2 * index], past[2 * index + 1]) if past else None
            x, both = layer(x, rotation, mask, cache)
            present += both
        return (self.head(self.norm(x)), *present)


class Plain(nn.Module):
    """Leave out the caches of a `CodeLM`."""

    def __init__(self, model: CodeLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 tokens `[batch, time]` to float32 logits `[batch, time, VOCABULARY]`."""
        logits: Tensor = self.model(tokens)[0]
        return logits


def split_heads(x: Tensor) -> Tensor:
    """Map `[batch, time, WIDTH]` to `[batch, HEADS, time, HEAD_WIDTH]`."""
    return x.view(*x.shape[:2], HEADS, HEAD_WIDTH).transpose(1, 2)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair `(i, i + HEAD_WIDTH / 2)` of `[batch, HEADS, time, HEAD_WIDTH]` by its position's angle."""
    cosine, sine = rotation
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat([-high, low], -1) * sine


def read_sources() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the bytes of the standard library's modules, NUL between files, as a training and a held-out part.

    Tests, codec tables and documentation strings kept as data are left out; one file in twenty is held out, by a
    hash of its path.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not LEFT_OUT.intersection(relative.parts):
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            parts[digest[0] % 20 == 0].append(path.read_bytes())
    train, held = (np.frombuffer(b"\0".join(parts[side]), dtype=np.uint8) for side in (False, True))
    return train, held


def windows(source: npt.NDArray[np.uint8], rows: int, length: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Cut `rows` random windows of `length` bytes out of `source`: int64 `[rows, length]`."""
    starts = rng.integers(0, len(source) - length, rows)
    return np.asarray(source[starts[:, None] + np.arange(length)], np.int64)


def train(model: CodeLM, source: npt.NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Fit `model` to `source` in bfloat16: Muon for the layers' matrices, AdamW for the rest, linear decay."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    compiled = torch.compile(model.train())
    start = time.perf_counter()
    smooth = math.log(VOCABULARY)
    for step in range(STEPS):
        batch = torch.from_numpy(windows(source, BATCH, CONTEXT + 1, rng))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = compiled(batch[:, :-1])[0]
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth += 0.02 * (loss.item() - smooth)
        if (step + 1) % 100 == 0:
            minutes = (time.perf_counter() - start) / 60
            print(f"step {step + 1:5d}  {smooth / math.log(2):.3f} bits per byte  {minutes:.1f} minutes", flush=True)
    model.eval()


def cached_feeds(model: CodeLM, rows: npt.NDArray[np.int64]) -> Feeds:
    """Return the feeds of the cached export for the bytes after the first `PAST` of each of `rows`.

    The caches are rounded to bfloat16, as float32, so that they compress.
    """
    with torch.no_grad():
        _, *past = model(torch.from_numpy(rows[:, :PAST]))
    feeds: Feeds = {"tokens": rows[:, PAST:]}
    for name, value in zip(cache_names("past"), past, strict=True):
        feeds[name] = value.bfloat16().float().numpy()
    return feeds


def cache_names(tense: str) -> list[str]:
    """Return the caches' names in the model's order: `past_key_0`, `past_value_0`, `past_key_1` and so on."""
    return [f"{tense}_{kind}_{index}" for index in range(LAYERS) for kind in ("key", "value")]


def export(model: CodeLM) -> None:
    """Write both exports over one weights file."""
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    past = [torch.zeros(2, HEADS, 5, HEAD_WIDTH) for _ in cache_names("past")]
    plain = export_traced(
        Plain(model),
        (tokens,),
        inputs=["tokens"],
        outputs=["logits"],
        dynamic_shapes=({0: "batch", 1: "time"},),
        prefix="model.",
    )
    cached = export_traced(
        model,
        (tokens, *past),
        inputs=["tokens", *cache_names("past")],
        outputs=["logits", *cache_names("present")],
        dynamic_shapes=({0: "batch", 1: "step"}, tuple({0: "batch", 2: "past"} for _ in past)),
    )
    save(
        {MODELS / "code_lm.onnx": plain, MODELS / "code_lm_cached.onnx": cached},
        weights=MODELS / "code_lm.weights",
    )


def session(name: str) -> ort.InferenceSession:
    """Open one of the exported models under ONNX Runtime."""
    return ort.InferenceSession(MODELS / f"{name}.onnx", providers=["CPUExecutionProvider"])


def check_cache(rows: npt.NDArray[np.int64]) -> float:
    """Decode int64 `rows` `[batch, time]` with the cached export, in steps of several sizes, from empty caches.

    Returns the largest difference between its logits and those of the plain export; raises where it passes 1e-3.
    """
    (wanted,) = session("code_lm").run(["logits"], {"tokens": rows})
    decoder = session("code_lm_cached")
    past = [np.zeros((len(rows), HEADS, 0, HEAD_WIDTH), np.float32) for _ in cache_names("past")]
    found, at = [], 0
    for step in (7, 1, 1, 2, *[1] * (rows.shape[1] - 11)):
        feeds = dict(zip(cache_names("past"), past, strict=True))
        logits, *past = decoder.run(None, {"tokens": rows[:, at : at + step], **feeds})
        found.append(logits)
        at += step
    difference = float(np.abs(np.concatenate(found, 1) - wanted).max())
    if difference > 1e-3:
        raise RuntimeError(f"cached decoding differs from the plain logits by {difference}")
    return difference


def describe(name: str, feeds: Feeds, label: npt.NDArray[np.int64]) -> str:
    """Return next-byte top-1 and bits per byte of an export, under ONNX Runtime."""
    (logits,) = session(name).run(["logits"], feeds)
    scores = torch.from_numpy(np.asarray(logits)).flatten(0, 1)
    wanted = torch.from_numpy(label).flatten()
    top1 = (scores.argmax(-1) == wanted).double().mean().item()
    bits = nn.functional.cross_entropy(scores.double(), wanted).item() / math.log(2)
    return f"{name}: top-1 {top1:.4f}, {bits:.4f} bits per byte over {wanted.numel()} bytes"


def main() -> None:
    """Train, export, write the calibration and evaluation data, check the caches, and print the metrics."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    source, held = read_sources()
    print(f"{len(source)} bytes to train on, {len(held)} held out")
    model = CodeLM()
    train(model, source, rng)

    calibration = windows(source, 32, LENGTH, rng)
    evaluation = windows(held, 128, LENGTH + 1, rng)
    cached_calibration = cached_feeds(model, windows(source, 8, PAST + LENGTH, rng))
    rows = windows(held, 32, PAST + LENGTH + 1, rng)
    cached_evaluation = cached_feeds(model, rows[:, :-1])
    feeds: Feeds = {"tokens": evaluation[:, :-1]}
    label, cached_label = evaluation[:, 1:], rows[:, PAST + 1 :]

    MODELS.mkdir(exist_ok=True)
    np.savez_compressed(MODELS / "code_lm_calib.npz", tokens=calibration)
    np.savez_compressed(MODELS / "code_lm_eval.npz", allow_pickle=False, label=label, **feeds)
    np.savez_compressed(MODELS / "code_lm_cached_calib.npz", allow_pickle=False, **cached_calibration)
    np.savez_compressed(MODELS / "code_lm_cached_eval.npz", allow_pickle=False, label=cached_label, **cached_evaluation)
    export(model)
    print(f"cached decoding reproduces the plain logits within {check_cache(evaluation[:2, :-1]):.1e}")
    print(describe("code_lm", feeds, label))
    print(describe("code_lm_cached", cached_evaluation, cached_label))


if __name__ == "__main__":
    main()
