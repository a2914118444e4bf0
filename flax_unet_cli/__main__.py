"""`flax-unet PROGRAM [flags]`: train, evaluate, predict or export a U-Net, and more."""

import importlib
import sys

from flax_unet_cli import interrupt

PROGRAMS = (
    "train",
    "evaluate",
    "predict",
    "serve",
    "export",
    "import_keras",
    "cross_validate",
    "ablate",
    "data_efficiency",
    "info",
)


def main() -> int:
    interrupt.watch()
    program = [name.replace("-", "_") for name in sys.argv[1:2]]
    if not program or program[0] not in PROGRAMS:
        if program and program[0] not in ("_h", "__help"):
            print(f"error: there is no program {sys.argv[1]!r}", file=sys.stderr)
        names = ", ".join(PROGRAMS).replace("_", "-")
        print(f"{__doc__}\n\nPrograms: {names}. Each of them has --help.")
        return 0 if program in (["_h"], ["__help"]) else 2
    sys.argv[:2] = [f"flax-unet {program[0].replace('_', '-')}"]  # the name in its help and errors
    return importlib.import_module(f"flax_unet_cli.{program[0]}").main()


if __name__ == "__main__":
    sys.exit(main())
