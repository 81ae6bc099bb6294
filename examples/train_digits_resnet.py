"""Train a small residual classifier on scikit-learn's digits and export it to ONNX.

Run `python examples/train_digits_resnet.py`; it writes `digits_resnet.onnx`, `digits_resnet_calib.npz` and
`digits_resnet_eval.npz` into `examples/models`. Needs torch, onnxscript, onnxruntime and scikit-learn.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from onnx_export import export_scripted, save
from sklearn.datasets import load_digits
from torch import Tensor, nn

MODELS = Path(__file__).resolve().parent / "models"
SEED = 20240
SIZE = 32
LEVELS = 16.0
EPOCHS = 60
BATCH = 64
PEAK_RATE = 0.02
HELD_OUT = 592
CALIBRATION = 128


class ResidualBlock(nn.Module):
    """Add two 3x3 Conv-BatchNorm stages to a shortcut, which is a 1x1 Conv-BatchNorm where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.widens = stride != 1 or channels_in != channels_out
        if self.widens:
            self.shortcut_conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 `[N, channels_in, H, W]` to `[N, channels_out, H / stride, W / stride]`."""
        y = nn.functional.relu(self.bn1(self.conv1(x)))
        shortcut = self.shortcut_bn(self.shortcut_conv(x)) if self.widens else x
        return nn.functional.relu(self.bn2(self.conv2(y)) + shortcut)


class DigitsResNet(nn.Module):
    """Classify 32x32 grey images of digits: a strided stem, three residual blocks, average pool, Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 64, 3, 2, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(64)
        self.block1 = ResidualBlock(64, 64, 1)
        self.block2 = ResidualBlock(64, 128, 2)
        self.block3 = ResidualBlock(128, 128, 1)
        self.classifier = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Map `image`, float32 `[N, 1, 32, 32]` in 0..1, to logits, float32 `[N, 10]`."""
        x = nn.functional.relu(self.stem_bn(self.stem(image)))
        x = self.block3(self.block2(self.block1(x)))
        logits: Tensor = self.classifier(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def augment(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw each 8x8 digit at 32x32 under a random rotation, scale, shear, shift, contrast and noise.

    `digits` is float32 `[N, 8, 8]` in 0..1; the result is float32 `[N, 1, 32, 32]` in 0..1 on the 17 grey
    levels of the original images.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(digits), *shape, generator=generator)

    angle, scale, shear = uniform(-0.5, 0.5), uniform(0.9, 1.4), uniform(-0.25, 0.25)
    rows = [
        torch.stack([scale * angle.cos(), scale * (shear - angle.sin()), uniform(-0.25, 0.25)], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(-0.25, 0.25)], 1),
    ]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), [len(digits), 1, SIZE, SIZE], align_corners=False)
    upscaled = nn.functional.interpolate(digits[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
    drawn = nn.functional.grid_sample(upscaled, grid, align_corners=False) * uniform(0.4, 1.0, 1, 1, 1)
    noise = torch.randn(drawn.shape, generator=generator) * uniform(0.0, 0.4, 1, 1, 1)
    return torch.round((drawn + noise).clamp(0, 1) * LEVELS) / LEVELS


def train(model: DigitsResNet, digits: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    """Fit `model` with SGD under a one-cycle rate; `digits` is float32 `[N, 8, 8]`, `labels` int64 `[N]`."""
    steps = EPOCHS * (len(digits) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), PEAK_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.2)
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        order = torch.randperm(len(digits), generator=generator)[: steps // EPOCHS * BATCH]
        for rows in order.view(-1, BATCH):
            logits = model(augment(digits[rows], generator))
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3d}  loss {total * EPOCHS / steps:.4f}", flush=True)
    model.eval()


def top1(path: Path, image: npt.NDArray[np.float32], label: npt.NDArray[np.int64]) -> float:
    """Return the share of `image` that the exported model puts into its `label`, under ONNX Runtime."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": image})
    return float(np.mean(np.asarray(logits).argmax(-1) == label))


def main() -> None:
    """Train, export, write the calibration and evaluation data, and print the held-out accuracy."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    data = load_digits()
    digits = torch.tensor(data.images / LEVELS, dtype=torch.float32)
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(digits), generator=generator)
    held, kept = order[:HELD_OUT], order[HELD_OUT:]

    model = DigitsResNet()
    start = time.perf_counter()
    train(model, digits[kept], labels[kept], generator)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")

    calibration = augment(digits[kept[:CALIBRATION]], generator).numpy()
    evaluation = augment(digits[held], generator).numpy()
    label = labels[held].numpy()
    MODELS.mkdir(exist_ok=True)
    np.savez_compressed(MODELS / "digits_resnet_calib.npz", image=calibration)
    np.savez_compressed(MODELS / "digits_resnet_eval.npz", image=evaluation, label=label)
    exported = export_scripted(
        model,
        (torch.zeros(2, 1, SIZE, SIZE),),
        inputs=["image"],
        outputs=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    save({MODELS / "digits_resnet.onnx": exported})
    print(f"held-out top-1 {top1(MODELS / 'digits_resnet.onnx', evaluation, label):.4f} of {HELD_OUT}")


if __name__ == "__main__":
    main()
