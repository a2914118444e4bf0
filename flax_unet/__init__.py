"""U-Nets for image segmentation in JAX: pure, small, exact.

The network
    model         UNet and its layers: image [B, H, W, C] to logits
    efficientnet  an EfficientNet-Lite encoder with ImageNet weights
    torch_file    reads the tensors of a PyTorch file without PyTorch
    cpu           compiler options and formulations for XLA on a CPU

From pictures to batches
    pictures      picture files: decoding, resizing
    folders       which files belong together, and to which split
    images        channels and the range of values of pictures
    formats       what the values of mask files mean
    parallel      one function for many files, on all cores
    summary       what a data set holds, and what resizing costs it
    data          data sets in memory, batches, streams
    augment       random changes of images and masks, on the device

Losses and metrics
    classes       what logits predict and masks say: one class, exclusive, overlapping
    losses        (logits, mask) to a loss per image
    metrics       counts per image, and Dice, IoU, precision, recall from them
    boundary      distances between the outlines of two masks

Training
    train         the state, and the step: (state, batch, key) to (state, metrics)
    fit           a generator of epochs
    recipes       what to train and how, as data

Trained models
    checkpoint    states on disk (Orbax)
    runs          a run's folder; load_model
    pack          a model as a small folder to ship
    predict       probabilities of images and pictures of any size
    evaluate      scores over a data set, and the report
    draw          pictures of predictions, learning curves
"""

__version__ = "0.2.0"


def __getattr__(name: str):
    if name == "UNet":  # imported on demand: the package itself imports nothing
        from flax_unet.model import UNet

        return UNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
