"""U-Nets for image segmentation in JAX: pure, small, exact.

The network
    model         UNet and its layers: image [B, H, W, C] to logits
    efficientnet  an EfficientNet-Lite encoder with ImageNet weights
    torch_file    reads the tensors of a PyTorch file without PyTorch
    cpu           compiler options and formulations for XLA on a CPU

From pictures to batches
    pictures      picture files: decoding, resizing
    folders       which files belong together, and to which split
    folds         the folds of a cross-validation
    images        channels and the range of values of pictures
    formats       what the values of mask files mean
    parallel      one function for many files, on all cores
    summary       what a data set holds, and what resizing costs it
    data          data sets in memory, batches, streams
    crops         crops of pictures at their own resolution
    augment       random changes of images and masks, on the device
    jpeg          JPEG compression of images, for augmentation

Losses and metrics
    classes       what logits predict and masks say: one class, exclusive, overlapping
    losses        (logits, mask) to a loss per image
    metrics       counts per image, and Dice, IoU, precision, recall from them
    boundary      distances between the outlines of two masks

Training
    devices       a mesh over several devices, and what is where
    processes     several processes that train together
    train         the state, and the step: (state, batch, key) to (state, metrics)
    fit           a generator of epochs
    recipes       what to train and how, as data

Trained models
    checkpoint    states on disk (Orbax)
    runs          a run's folder; load_model
    pack          a model as a small folder to ship
    zoo           the models that come with the package
    tiles         windows that cover a picture, and the weights that blend them
    predict       probabilities of images and pictures of any size
    objects       connected objects of a mask: area, box, centroid
    video         videos, a frame at a time (ffmpeg)
    evaluate      scores over a data set, and the report
    shifts        pictures as other endoscopes could have taken them
    negatives     parts of pictures without an object
    calibration   a temperature, with which probabilities say how often they are right
    report        the report as a page of HTML
    svg           its plots
    draw          pictures of predictions, learning curves

To and from other programs
    onnx_file     a model as an ONNX file, and ONNX Runtime
    stablehlo_file  a model as a StableHLO file for jax alone
    safetensors_file  a model's weights for PyTorch and others
    keras_file    weights of the tutorial's network from Keras' files
    hdf5_file     reads the arrays of an HDF5 file that may be hostile
"""

__version__ = "0.3.0.dev0"


def __getattr__(name: str):  # on demand: the package itself imports nothing
    if name == "UNet":
        from flax_unet.model import UNet

        return UNet
    if name == "load_model":
        from flax_unet.runs import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
