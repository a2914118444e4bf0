"""The type of a flag that names a trained model."""

from pathlib import Path
from typing import Annotated

import tyro

from flax_unet import zoo

#: A folder, or the name of a shipped model, which becomes its folder. The text is looked at before
#: it is a path, because Path("./strong") is Path("strong").
ModelPath = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME|DIR",
        instance_from_str=lambda words: zoo.named(words[0]) or Path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
