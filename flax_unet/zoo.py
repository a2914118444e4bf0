"""The models that come with the package, by name.

Their cards (README.md in each folder) say how good they are, on what they were trained, and under
which terms they may be used, which are not those of the code: see LICENSE beside the folders.
"""

import os
from pathlib import Path

#: Names of the shipped models.
NAMES = ("pretrained", "strong")


def folder(name_or_path: str | os.PathLike) -> Path:
    """The absolute path of a model's folder.

    Args:
        name_or_path: the name of a shipped model, or a folder.

    Raises:
        FileNotFoundError: there is no such folder, nor a shipped model of that name.
        ValueError: there are both.
    """
    path = named(name_or_path) or Path(name_or_path).expanduser().absolute()
    if not path.exists():
        names = " and ".join(NAMES)
        raise FileNotFoundError(f"{path} does not exist; the shipped models are {names}")
    return path


def named(name: str | os.PathLike) -> Path | None:
    """The folder of the shipped model with this name; None if there is none.

    Raises:
        ValueError: something else here has the same name, so that it is not clear what is meant.
    """
    path, here = shipped(text := os.fspath(name)), Path(text).absolute()
    if path is not None and here.exists() and not here.samefile(path):
        raise ValueError(
            f"{text} is a shipped model, and also {here}: write {here} for the folder, {path} for "
            "the shipped model, or rename the folder"
        )
    return path


def shipped(name: str) -> Path | None:
    """Where the shipped model with this name is; None if there is none.

    In a wheel the models are in the package, in a checkout beside it.
    """
    package = Path(__file__).absolute().parent
    places = (package / "models" / name, package.parent / "models" / name)
    return next((p for p in places if name in NAMES and (p / "model.json").is_file()), None)
