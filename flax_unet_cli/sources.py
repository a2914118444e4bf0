"""The data set that the flags name, and what the values of its pictures and masks mean."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flax_unet import data, folds, images
from flax_unet.formats import BINARY, MaskFormat, find
from flax_unet.images import ImageFormat
from flax_unet.pictures import DataError
from flax_unet.runs import Places, Settings
from flax_unet_cli.program import cache_folder, task

#: Prefix of a data set of TFDS.
TFDS = "tfds:"

Sources = dict[str, Sequence[dict[str, Any]]]


def open_sources(settings: Settings, places: Places, classes: Sequence[str] = ()) -> Sources:
    """The splits of the data set, or of a fold of it, each a source for `flax_unet.data`.

    Args:
        settings, places: of the run.
        classes: --classes, of which those of --mask-files class have files of their own.

    Raises:
        ValueError: the data is unusable, or a flag is missing or belongs to another data set.
    """
    sources = _open(settings, places, classes)
    if settings.fold is None:
        return sources
    return folds.split(sources, *settings.fold, places.group)


def check_used(settings: Settings, places: Places) -> None:
    """Refuse flags that have no effect on the data set; older versions took them.

    Raises:
        DataError: there is one.
    """
    if settings.protocol != Settings.protocol and protocol(settings) is None:
        raise DataError("--protocol needs --dataset kvasir_seg")
    if places.split_by != Places.split_by and (settings.dataset != "folder" or places.split_file):
        raise DataError("--split-by needs --dataset folder, without --split-file")
    if places.data_dir is not None and settings.dataset == "folder":
        raise DataError("--data-dir is for data sets of TFDS: leave it out")


def _open(settings: Settings, places: Places, classes: Sequence[str]) -> Sources:
    """The splits of the data set itself."""
    folder = ("images", "masks", "image_suffix", "mask_suffix", "split_file", "group")
    only = dict.fromkeys(folder, "folder") | {"kvasir_zip": "kvasir_seg"}
    only |= dict.fromkeys(("image_key", "mask_key", "tfds_splits"), "tfds:NAME")
    if places.mask_files != "one" and settings.dataset != "folder":
        raise DataError("--mask-files needs --dataset folder")
    kind = "tfds:NAME" if settings.dataset.startswith(TFDS) else settings.dataset
    if settings.fold is not None:
        del only["group"]  # the folds of any data set may keep groups together
    for flag, dataset in only.items():
        if getattr(places, flag) and kind != dataset:
            raise DataError(f"--{flag.replace('_', '-')} needs --dataset {dataset}")
    if settings.dataset == "folder":
        if places.images is None or places.masks is None:
            raise DataError("--dataset folder needs --images DIR and --masks DIR")
        sources = {
            split: data.FolderSource(
                places.images,
                places.masks,
                split,
                image_suffix=places.image_suffix,
                mask_suffix=places.mask_suffix,
                split_file=places.split_file,
                group=places.group,
                split_by=places.split_by,
                mask_files=places.mask_files,
                classes=classes if places.mask_files != "one" else (),
            )
            for split in data.SPLITS
        }
        if missing := sources["train"].without_files:
            raise DataError(f"no mask file in {places.masks} is of class {missing[0]!r}")
        return dict(sources)
    if settings.dataset.startswith(TFDS):
        return _open_tfds(settings.dataset.removeprefix(TFDS), places)
    import tfds_kvasir  # imports TFDS, which a folder does not need

    if settings.dataset not in (names := tfds_kvasir.datasets()):
        raise DataError(
            f"there is no data set {settings.dataset!r}: choose one of {', '.join(names)}, "
            "tfds:NAME or folder"
        )
    if (name := protocol(settings)) and name not in (protocols := names[settings.dataset]):
        raise DataError(
            f"{settings.dataset} has no protocol {name!r}: choose one of {', '.join(protocols)}"
        )
    options = {} if places.kvasir_zip is None else {"kvasir_zip": places.kvasir_zip}
    return tfds_kvasir.sources(
        settings.dataset, protocol(settings), data_dir=places.data_dir, **options
    )


def _open_tfds(name: str, places: Places) -> Sources:
    """The splits of any data set of TFDS."""
    import tensorflow_datasets as tfds

    import tfds_kvasir  # registers its data sets

    try:
        builder = tfds.builder(name, data_dir=places.data_dir)
    except (tfds.core.DatasetNotFoundError, ImportError) as error:
        raise DataError(f"TFDS has no data set {name!r}, or cannot load it: {error}") from error
    keys = {"image": places.image_key or "image", "mask": places.mask_key or "mask"}
    return tfds_kvasir.open_splits(builder, places.tfds_splits or data.SPLITS, **keys)


@dataclass(frozen=True)
class MaskFlags:
    """What the values of masks mean; without a flag it must be clear from the masks themselves."""

    classes: tuple[str, ...] = ()
    """Names of the classes, background included, of masks that hold their indices; or a text, JSON
    or CSV file with names, and values or colours; with --mask-files class the names of the files'
    classes (--dataset folder or tfds:NAME, as the next ones)."""
    foreground: tuple[int, ...] = ()
    """Values of the foreground; all others are background."""
    ignore: tuple[int, ...] = ()
    """Values of pixels that do not count."""
    mask_threshold: float | None = None
    """Grey value above which a pixel is foreground."""
    overlapping: bool = False
    """The classes of --mask-files class may overlap: each is learned as a yes or no of its own."""


@dataclass(frozen=True)
class RangeFlags:
    """Which values of pictures are black and white; those of 8 bits need no flag."""

    value_range: tuple[float, ...] = ()
    """Values that become black and white, LOW HIGH, or a pair for each channel. By default measured
    over the training split, for pictures of more than 8 bits."""
    percentiles: tuple[float, float] | None = None
    """Percentiles of each picture that become black and white, such as 1 99, as is usual in
    microscopy."""

    def apply(self, image_format: ImageFormat) -> ImageFormat:
        """The format of a model with these ranges instead of its own."""
        ends = images.declared_range(self.value_range, self.percentiles)
        if ends is None:
            return image_format
        return replace(
            image_format, kind=None, low=ends[0], high=ends[1], percentiles=self.percentiles
        )


@dataclass(frozen=True)
class ImageFlags(RangeFlags):
    """What pictures hold; without a flag it is found from the training split."""

    channels: int | None = None
    """Channels of the images: 1 grey, 3 colours, 4 colours and alpha, or that of the arrays or TIFF
    pages. By default 1 if all pictures are grey, else 3."""


def image_format_of(settings: Settings, sources: Sources, flags: ImageFlags) -> ImageFormat:
    """Channels and range of the images, from the flags or from the training split.

    Of a fold they are found from the pictures of all folds, so that their models can become one.

    Raises:
        DataError: the pictures do not agree, or the flags contradict each other.
    """
    source = split_of(settings, sources, "train")
    if settings.fold is not None:
        source = folds.together(sources)
    with task(f"looking at {len(source)} training pictures"):
        return images.find(source, **vars(flags))


def mask_format_of(settings: Settings, sources: Sources, flags: MaskFlags) -> MaskFormat:
    """What the values of the data set's masks mean, from the flags or from all masks.

    Raises:
        ValueError: it is not clear, or a flag is given for a data set that needs none.
    """
    ours = settings.dataset != "folder" and not settings.dataset.startswith(TFDS)
    if ours and flags != MaskFlags():
        raise DataError(f"the masks of {settings.dataset} are known: leave out --classes, ...")
    source: Any = sources["train"]
    classes = () if settings.dataset == "folder" else source.classes
    if classes and replace(flags, ignore=()) == MaskFlags():
        return find(names=classes, ignore=sorted({*source.ignore, *flags.ignore}))
    if ours:
        return BINARY
    with task(f"looking at {sum(map(len, sources.values()))} masks"):
        return declared(flags, *sources.values())


def declared(flags: MaskFlags, *sources: Sequence[dict[str, Any]]) -> MaskFormat:
    """The format that the flags declare, or that is found in the masks of the sources."""
    separate = getattr(sources[0], "mask_files", "one") != "one"
    return find(
        *sources,
        names=sources[0].classes if separate else flags.classes,  # type: ignore[attr-defined]
        foreground=flags.foreground,
        ignore=flags.ignore,
        threshold=flags.mask_threshold,
        overlapping=flags.overlapping,
    )


def protocol(settings: Settings) -> str | None:
    """The protocol, or None if the data set has no choice of them."""
    if settings.dataset == "folder":
        return None
    import tfds_kvasir

    return settings.protocol if tfds_kvasir.datasets().get(settings.dataset) else None


def split_of(settings: Settings, sources: Sources, split: str) -> Sequence[dict[str, Any]]:
    """One of the sources.

    Raises:
        ValueError: the split does not exist, or is empty.
    """
    if split not in sources:
        name = "/".join(filter(None, (settings.dataset, protocol(settings))))
        raise DataError(f"{name} has no split {split!r}: choose one of {', '.join(sources)}")
    if not len(sources[split]):
        total = sum(map(len, sources.values()))
        raise DataError(
            f"the {split} split of the {total} pictures is empty: the splits get about 80, 10 and "
            "10 % of them, so add some"
        )
    return sources[split]


def load_split(
    settings: Settings,
    sources: Sources,
    split: str,
    mask_format: MaskFormat,
    image_format: ImageFormat,
    pictures: dict[bytes, str] | None = None,
) -> data.Arrays:
    """One split as arrays, from the cache if it was decoded before.

    Raises:
        ValueError: as `split_of`, or a picture is unusable.
    """
    source = split_of(settings, sources, split)
    with task(f"loading {len(source)} pictures of {split}"):
        return data.load(
            source,
            settings.size,
            mask_format,
            image_format,
            cache=cache_folder(),
            pictures=pictures,
        )
