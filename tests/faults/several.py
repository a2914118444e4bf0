"""Programs that run as several processes on this computer."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Several:
    """The same Python program in n processes, each with so many fake devices.

    They are killed at the end of the block.

    Args:
        n: number of processes.
        devices: of each.
        arguments: of Python.
    """

    def __init__(self, n: int, devices: int, arguments: Sequence[Any]):
        address = f"127.0.0.1:{free_port()}"
        variables = {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            # A restarted program finds what the first one compiled.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        self.outputs = [""] * n
        self.processes, self._readers = [], []
        for i in range(n):
            flags = ["--coordinator", address, "--processes", str(n), "--process", str(i)]
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments), *flags],
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.processes.append(process)
            reader = threading.Thread(target=self._read, args=(i, process))
            reader.start()
            self._readers.append(reader)

    def _read(self, i: int, process: subprocess.Popen) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.outputs[i] += line

    def __enter__(self) -> "Several":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()

    def wait(self, seconds: float = 240) -> list[int]:
        """The exit codes, once all have ended."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.wait(max(0.1, end - time.monotonic()))
        for reader in self._readers:
            reader.join()
        return [process.returncode for process in self.processes]

    def until(self, happened: Any, seconds: float = 240) -> None:
        """Wait for something while all run."""
        end = time.monotonic() + seconds
        while not happened():
            assert all(p.poll() is None for p in self.processes), self.outputs
            assert time.monotonic() < end, self.outputs
            time.sleep(0.001)


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def train(n: int, devices: int, *flags: Any) -> Several:
    """`flax-unet train` in n processes."""
    return Several(n, devices, ["-m", "flax_unet_cli", "train", *flags])
