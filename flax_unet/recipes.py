"""Recipes: what to train and how, as data."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_unet import augment, losses, train
from flax_unet.classes import IGNORE
from flax_unet.efficientnet import Encoder, Variant
from flax_unet.model import ARTICLE, UNet


@dataclass(frozen=True)
class Adam:
    """Adam with Keras' defaults and a constant learning rate.

    Keras adds its epsilon before the bias correction of the second moment (the "epsilon hat" of
    Kingma, Ba, ICLR 2015, section 2), optax after it. In the first step the 1e-7 of Keras acts like
    3.2e-6 in optax, which is more than most entries of a U-Net's gradient.
    """

    fixed_length: ClassVar[bool] = False

    def build(self, learning_rate: float, steps: int) -> optax.GradientTransformation:
        def epsilon(count: jax.Array) -> jax.Array:
            return 1e-7 / jnp.sqrt(1 - 0.999 ** (count + 1))

        return optax.inject_hyperparams(optax.adam)(learning_rate, b1=0.9, b2=0.999, eps=epsilon)


@dataclass(frozen=True)
class AdamW:
    """AdamW with linear warm-up and cosine decay of the learning rate to 0.

    Weight decay applies to kernels only.

    Loshchilov, Hutter: "Decoupled Weight Decay Regularization", ICLR 2019.

    Attributes:
        warmup: fraction of the steps in which the rate rises from 0.
        clip: maximum global norm of the gradient.
        weight_decay: per step, times the learning rate.
        average_decay: of the moving average of the parameters.
        encoder_rate: learning-rate multiplier of the module `encoder`.
    """

    #: The schedule spans all epochs, so a run cannot be extended later.
    fixed_length: ClassVar[bool] = True

    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.02
    average_decay: float = 0.999
    encoder_rate: float = 1.0

    def build(self, learning_rate: float, steps: int) -> optax.GradientTransformation:
        warmup = max(1, int(self.warmup * steps))
        rate = optax.warmup_cosine_decay_schedule(0, learning_rate, warmup, max(2, steps))

        def kernels(params: Any) -> Any:
            return jax.tree.map(lambda x: x.ndim > 1, params)

        def encoder(params: Any) -> Any:
            return {name: name == "encoder" for name in params}

        scale_encoder = optax.masked(optax.scale(self.encoder_rate), encoder)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(rate, weight_decay=self.weight_decay, mask=kernels),
            *([] if self.encoder_rate == 1 else [scale_encoder]),
            train.average_params(self.average_decay),
        )


@dataclass(frozen=True)
class Recipe:
    """What to train and how.

    Attributes:
        about: what it is, what it costs and how good it is.
        model: the network.
        loss: name of a function in `flax_unet.losses`.
        augment: functions of `flax_unet.augment` by name, in order, and their settings.
        optimizer: with its learning-rate schedule.
        imagenet: whether the encoder starts with ImageNet weights.
        class_weight: of exclusive classes, see `losses.cross_entropy`.
    """

    about: str
    model: UNet
    loss: str = "bce"
    augment: dict[str, dict[str, Any]] = field(default_factory=dict)
    optimizer: Adam | AdamW = Adam()
    imagenet: bool = False
    class_weight: tuple[float, ...] | None = None


_STRONG_AUGMENT = {
    "random_affine": {
        "rotation": 180.0,
        "scale": 1.5,
        "shear": 15.0,
        "shift": 0.125,
        "elastic": 0.02,
    },
    "random_colour": {
        "brightness": 0.3,
        "contrast": 0.3,
        "saturation": 0.3,
        "hue": 15.0,
        "tint": 0.15,
        "gamma": 1.5,
    },
    "random_light": {"shade": 0.5, "haze": 0.4},
    "random_blur": {"sigma": 0.0, "share": 0.008},
    "random_noise": {"deviation": 0.03},
}
_STRONG = UNet(
    features=(24, 48, 96, 192, 384),
    convs=2,
    norm="batch",
    residual=True,
    patch=2,
    deep=True,
)

#: Times and Dice: Kvasir-SEG; Dice is the mean over the test pictures. See docs/results.md.
RECIPES = {
    "unet": Recipe(
        about="the tutorial's channel counts with instance norm and augmentation. 4 minutes per "
        "epoch at 256x256; Dice 0.796 after 30 epochs (protocol article, flips only).",
        model=UNet(),
        augment={
            "random_affine": {"rotation": 180.0, "scale": 1.25, "shear": 10.0, "shift": 0.1},
            "random_colour": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 10.0},
        },
    ),
    "article": Recipe(
        about="the tutorial's network, loss and optimizer. 4 minutes per epoch at 256x256; it "
        "predicts no polyp at all for at least the first 10 epochs.",
        model=ARTICLE,
    ),
    "strong": Recipe(
        about="residual blocks, batch norm, 2x2 patches, BCE + Dice, AdamW, averaged parameters. "
        "6 minutes for 300 epochs at 352x352 on an H200; Dice 0.912, with flips 0.915 (protocol "
        "effisegnet). On 2 CPU cores an epoch takes 46 s at 128x128.",
        model=_STRONG,
        loss="bce_soft_dice",
        augment=_STRONG_AUGMENT,
        optimizer=AdamW(),
    ),
    "pretrained": Recipe(
        about="strong's decoder on an EfficientNet-Lite pretrained on ImageNet. 9 minutes for 120 "
        "epochs of lite2 at 352x352 on an H200; Dice 0.930, with flips 0.938 (effisegnet).",
        model=_STRONG.clone(features=(24, 48, 96, 128), patch=1, encoder=Encoder("lite0")),
        loss="bce_soft_dice",
        augment=_STRONG_AUGMENT,
        optimizer=AdamW(encoder_rate=0.3),
        imagenet=True,
    ),
}


#: Largest rotation of pictures that have a top, in degrees.
TILT = 10.0
#: The losses for exclusive classes in place of those for one class.
EXCLUSIVE = {"bce": "cross_entropy", "bce_soft_dice": "cross_entropy_soft_dice"}


def configure(
    recipe: Recipe,
    *,
    features: tuple[int, ...] | None = None,
    encoder: Variant | None = None,
    dtype: str = "float32",
    num_classes: int = 1,
    overlapping: bool = False,
    upright: bool = False,
    crop: tuple[int, int] | None = None,
) -> Recipe:
    """The recipe with another network.

    With exclusive classes the loss is `EXCLUSIVE[recipe.loss]`. With several classes
    `random_affine` marks the pixels from outside the image as not counted.

    Args:
        recipe: from `RECIPES`, or your own.
        features: channels per level; by default the recipe's.
        encoder: variant of the encoder; by default the recipe's.
        dtype: type of the computation.
        num_classes: 1, or the number of classes.
        overlapping: whether these are independent of each other, and not exclusive.
        upright: whether pictures have a top, and `random_affine` rotates them by `TILT` at most.
        crop: height and width of the crops that it is trained on, if it is. `random_affine` takes
            them from larger frames, see `flax_unet.crops`, and shifts nothing.

    Raises:
        ValueError: the recipe has no encoder, or the number of features is wrong.
    """
    model = recipe.model
    features = model.features if features is None else features
    if not 1 <= len(features) <= len(UNet.features) or min(features) < 1:
        raise ValueError(f"features is {features}: give one to six positive numbers")
    changes: dict[str, Any] = {"features": features, "dtype": jnp.dtype(dtype)}
    affine = recipe.augment.get("random_affine")
    if affine and upright:
        rotation = min(TILT, affine.get("rotation", TILT))
        affine = affine | {"rotation": rotation, "upright": True}
    if num_classes > 1:
        changes |= {"num_classes": num_classes, "overlapping": overlapping}
        affine = affine and affine | {"outside": IGNORE}
        if not overlapping:
            recipe = replace(recipe, loss=EXCLUSIVE.get(recipe.loss, recipe.loss))
    if crop is not None:
        affine = affine and affine | {"size": crop, "outside": IGNORE, "shift": 0.0}
    if affine:
        recipe = replace(recipe, augment=recipe.augment | {"random_affine": affine})
    if isinstance(model.dropout, tuple):
        changes["dropout"] = model.dropout[: len(features)]
    if model.encoder is not None:
        variant = encoder or model.encoder.variant
        changes["encoder"] = Encoder(variant, dtype=jnp.dtype(dtype))
    elif encoder is not None:
        raise ValueError(f"encoder is {encoder}, but this recipe has none: leave it out")
    return replace(recipe, model=model.clone(**changes))


class Training(NamedTuple):
    """The network, optimizer, loss and augmentation of a recipe, as `fit` takes them."""

    model: UNet
    tx: optax.GradientTransformation
    loss_fn: train.Loss
    augment: augment.Augment | None


def build(recipe: Recipe, *, learning_rate: float, steps: int) -> Training:
    """The network, optimizer, loss and augmentation of a recipe.

    >>> training = build(RECIPES["strong"], learning_rate=1e-3, steps=1000)
    >>> training.model.norm, training.loss_fn.__name__
    ('batch', 'bce_soft_dice')

    Args:
        recipe: from `RECIPES` or `configure`, or your own.
        learning_rate: the constant or the peak rate.
        steps: number of steps of the training run, which a schedule spans.
    """
    augments = [
        partial(getattr(augment, name), **settings) for name, settings in recipe.augment.items()
    ]
    return Training(
        recipe.model,
        recipe.optimizer.build(learning_rate, steps),
        loss_of(recipe.loss, recipe.class_weight),
        augment.chain(*augments) if augments else None,
    )


def loss_of(name: str, class_weight: Sequence[float] | None = None) -> train.Loss:
    """The loss of a name in `flax_unet.losses`, with class weights if there are any."""
    loss = getattr(losses, name)
    return loss if class_weight is None else partial(loss, class_weight=tuple(class_weight))


def describe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, without its network (`pack.describe`)."""
    return {
        "loss": recipe.loss,
        "augment": recipe.augment,
        "optimizer": {"name": type(recipe.optimizer).__name__, **asdict(recipe.optimizer)},
        "imagenet": recipe.imagenet,
        "class_weight": recipe.class_weight,
    }


def as_described(recipe: Recipe, description: dict[str, Any]) -> Recipe:
    """The recipe with the loss, augmentation and optimizer that `describe` wrote of another one.

    >>> strong, unet = RECIPES["strong"], RECIPES["unet"]
    >>> as_described(unet, describe(strong)).loss
    'bce_soft_dice'

    Raises:
        ValueError: the description is of another version, whose functions or settings are others.
    """
    try:
        values = dict(description["optimizer"])
        optimizer = {"Adam": Adam, "AdamW": AdamW}[values.pop("name")](**values)
        augments = {
            name: {key: tuple(x) if isinstance(x, list) else x for key, x in settings.items()}
            for name, settings in description["augment"].items()
        }
        for name, settings in augments.items():
            inspect.signature(getattr(augment, name)).bind_partial(**settings)
        loss_of(description["loss"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"this recipe is of another version or program: {error}") from error
    return replace(recipe, loss=description["loss"], augment=augments, optimizer=optimizer)
