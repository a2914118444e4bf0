"""`flax-unet PROGRAM [flags]`: train, evaluate, predict or export a U-Net, or run a study."""

import importlib
import sys

PROGRAMS = ("train", "evaluate", "predict", "export", "ablate", "data_efficiency")


def main() -> int:
    program = [name.replace("-", "_") for name in sys.argv[1:2]]
    if not program or program[0] not in PROGRAMS:
        print(f"{__doc__}\n\nPrograms: {', '.join(PROGRAMS)}. Each of them has --help.")
        return 0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2
    return importlib.import_module(f"flax_unet_cli.{program[0]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
