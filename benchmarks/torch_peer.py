"""The tutorial's network and training in idiomatic PyTorch, as a worker.

`python benchmarks/torch_peer.py eager|compile IMAGES`; see worker.py.
"""

import contextlib
import os
import sys

import albumentations
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from worker import images, serve

FEATURES = (16, 32, 64, 128, 256, 512)
DROPOUT = (0.1, 0.1, 0.2, 0.2, 0.3, 0.3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def block(channels: int, features: int, rate: float) -> nn.Sequential:
    """Convolution, convolution, dropout, convolution; each with ReLU."""
    widths, layers = (channels, features, features), []
    for i, width in enumerate(widths):
        if i == 2:
            layers.append(nn.Dropout(rate))
        conv = nn.Conv2d(width, features, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)
        layers += [conv, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """The tutorial's network: [B, 3, H, W] in [0, 1] to logits [B, 1, H, W]."""

    def __init__(self):
        super().__init__()
        below = (3, *FEATURES)
        self.down = nn.ModuleList(
            block(c, f, r) for c, f, r in zip(below[:-1], FEATURES, DROPOUT, strict=True)
        )
        levels = range(len(FEATURES) - 1)
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(FEATURES[i + 1], FEATURES[i], 2, stride=2) for i in levels
        )
        self.up = nn.ModuleList(block(2 * FEATURES[i], FEATURES[i], DROPOUT[i]) for i in levels)
        self.head = nn.Conv2d(FEATURES[0], 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down in self.down[:-1]:
            skips.append(down(x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.down[-1](x)
        for upsample, up, skip in zip(
            reversed(self.upsample), reversed(self.up), reversed(skips), strict=True
        ):
            x = up(torch.cat([upsample(x), skip], dim=1))
        return self.head(x)


class Augmented(Dataset):
    """Images uint8 [N, H, W, 3] and masks [N, H, W, 1], each pair augmented separately."""

    def __init__(self, image: np.ndarray, mask: np.ndarray):
        self.image, self.mask = image, mask
        self.change = albumentations.Compose(
            [
                albumentations.HorizontalFlip(),
                albumentations.VerticalFlip(),
                albumentations.Affine(
                    rotate=(-180, 180),
                    scale=(0.8, 1.25),
                    shear=(-10, 10),
                    translate_percent=(-0.1, 0.1),
                    p=1,
                ),
                albumentations.ColorJitter(0.2, 0.2, 0.2, 10 / 360, p=1),
            ]
        )

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, i: int) -> list[np.ndarray]:
        pair = self.change(image=self.image[i], mask=self.mask[i])
        return [np.moveaxis(pair[key], -1, 0) for key in ("image", "mask")]


def autocast_context(precision: str):
    """A context in which computations have this precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision == "bfloat16":
        return torch.autocast(DEVICE, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def to_input(image: torch.Tensor) -> torch.Tensor:
    """Convert uint8 [B, 3, H, W] to float on the device, channels last in memory."""
    image = image.to(DEVICE, non_blocking=True).float() / 255
    return image.contiguous(memory_format=torch.channels_last)


class Workload:
    """Network, optimizer and images; `work` performs a request, see worker.py."""

    def __init__(self, mode: str, n: int):
        self.model = UNet().to(DEVICE, memory_format=torch.channels_last)
        assert sum(p.numel() for p in self.model.parameters()) == 11_707_729
        self.tx = torch.optim.Adam(self.model.parameters(), lr=1e-3, eps=1e-7, fused=True)
        self.forward = torch.compile(self.model) if mode == "compile" else self.model
        self.arrays = images(n)
        self.resident = [torch.from_numpy(x).permute(0, 3, 1, 2).to(DEVICE) for x in self.arrays]
        self.loaders: dict[int, DataLoader] = {}

    def step(self, image: torch.Tensor, mask: torch.Tensor, precision: str) -> None:
        self.model.train()
        self.tx.zero_grad(set_to_none=True)
        with autocast_context(precision):
            logits = self.forward(to_input(image))
        labels = mask.to(DEVICE, non_blocking=True).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        loss.backward()
        self.tx.step()

    def infer(self, image: torch.Tensor, precision: str) -> None:
        self.model.eval()
        with torch.inference_mode(), autocast_context(precision):
            self.forward(to_input(image)).sigmoid()

    def loader(self, batch: int) -> DataLoader:
        if batch not in self.loaders:
            self.loaders[batch] = DataLoader(
                Augmented(*self.arrays),
                batch,
                shuffle=True,
                num_workers=os.cpu_count() or 1,
                persistent_workers=True,
                pin_memory=DEVICE == "cuda",
            )
        return self.loaders[batch]

    def work(self, kind: str, precision: str, batch: int, times: int) -> None:
        image, mask = self.resident
        for _ in range(times):
            if kind == "step":
                self.step(image[:batch], mask[:batch], precision)
            elif kind == "infer":
                self.infer(image[:batch], precision)
            elif kind == "epoch":
                for index in torch.randperm(len(image)).split(batch):
                    self.step(image[index], mask[index], precision)
            else:
                for augmented in self.loader(batch):
                    self.step(*augmented, precision)
        if DEVICE == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    workload = Workload(sys.argv[1], int(sys.argv[2]))
    serve(workload.work, torch.cuda.max_memory_allocated if DEVICE == "cuda" else None)
