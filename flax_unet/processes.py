"""Several processes that train together, each with devices of its own (`jax.distributed`).

All run the same program with the same arguments. Where one of them does or knows something alone,
they exchange it here; everything else is computed over a mesh of all their devices. One process is
the usual case, which costs nothing: `count` is 1, and nothing is exchanged.
"""

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flax_unet import devices

T = TypeVar("T")

#: Seconds after which a process that JAX no longer hears of is lost; JAX then ends the others.
HEARTBEAT = 30
#: Seconds for which a process that has failed waits for the others, which may have failed, too.
PATIENCE = 10
#: Bytes that each process sends at a time.
BLOCK = 2**26


def start(
    coordinator: str | None = None, number: int | None = None, index: int | None = None
) -> None:
    """Become one of several processes. Call it before JAX uses a device.

    Without arguments JAX finds the others: those of a SLURM step, of Cloud TPU, of a Kubernetes job
    or of Open MPI. If a process is lost, JAX ends the others within about `HEARTBEAT` seconds.

    Args:
        coordinator: HOST:PORT of process 0, with a port that is free there.
        number: of processes.
        index: of this one, from 0.

    Raises:
        ValueError: some arguments are missing, or JAX finds no other processes.
        ConnectionError: they do not answer within five minutes.
    """
    given = coordinator, number, index
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError("--coordinator, --processes and --process go together: give all three")
    method = None if coordinator is None else "deactivate"  # all devices of this machine
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        jax.distributed.initialize(
            *given, cluster_detection_method=method, heartbeat_timeout_seconds=HEARTBEAT
        )
    except ValueError as error:
        raise ValueError(
            f"JAX finds no other processes ({error}): start this one with srun, on each worker of "
            "a TPU, in a Kubernetes job or with mpirun; or give --coordinator, --processes and "
            "--process"
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error)[:200].splitlines())
        raise ConnectionError(f"the other processes do not answer: {reason}") from error
    for which, handler in handlers.items():  # JAX has its own for SIGTERM
        signal.signal(which, handler)
    # On CPUs they connect in their first exchange, which fails if one of them is 30 seconds late
    # (Gloo's limit); later they wait. So it is here, where all have just begun.
    each(lambda: None)
    everywhere = Mesh(jax.devices(), "device")
    one = devices.place(np.ones(everywhere.size), devices.split(everywhere))
    jax.jit(jnp.sum, out_shardings=devices.replicated(everywhere))(one).block_until_ready()


def others_unasked() -> str | None:
    """What says that this is one of several processes that know nothing of each other, if it is."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("", "1") and count() == 1:
            return f"{name}={os.environ[name]}"
    return None


def count() -> int:
    """The number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def first_of_host() -> bool:
    """Whether this is the first process on its computer. All of them must call this."""
    return each(socket.gethostname).index(socket.gethostname()) == index()


def each(function: Callable[[], T]) -> list[T]:
    """What a function returns in each process, in their order. All of them must call this.

    What it returns is pickled. The processes wait for each other.

    Raises:
        Exception: it failed in one process; all get the error of the first one that it failed in.
    """
    if count() == 1:
        return [function()]
    own: Exception | None = None
    try:
        outcome = function(), None
    except Exception as error:
        own, outcome = error, (None, _portable(error))
    outcomes = _exchange(outcome) if own is None else _exchange_error(outcome, own)
    for _, error in outcomes:
        if error is not None:
            error._exchanged = True  # type: ignore[attr-defined]
            raise own or error
    return [value for value, _ in outcomes]


def first(function: Callable[[], T]) -> T:
    """What a function returns in the first process, the only one that calls it; see `each`."""
    return each(function if index() == 0 else lambda: None)[0]  # type: ignore[return-value]


def in_turn(function: Callable[[], T]) -> T:
    """What a function returns here; the others call it when the first process has done so.

    For a function that makes what they then find. An error is raised as in `each`.
    """
    results: list[T] = []
    for turn in (True, False)[: count()]:
        with together():
            if turn == (index() == 0):
                results.append(function())
    return results[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that fails in all processes if it fails in one; they wait for each other at its end.

    An error reaches the others at the end of the block, or at the next `each` inside of it.
    """
    if count() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if not getattr(error, "_exchanged", False):
            _exchange_error((None, _portable(error)), error)
        raise
    each(lambda: None)


def agreed(signals: Sequence[int], mesh: Mesh | None) -> Callable[[], int]:
    """A function that tells, equally in all processes, whether one of them got a signal.

    Args:
        signals: those of this process; more may be appended to it.
        mesh: over the devices of all processes.

    Returns:
        A function that returns the largest signal of all processes at the call before, or 0; so
        that none waits for the others. All must call it equally often. One process has no delay.
    """
    if count() == 1 or mesh is None:
        return lambda: max(signals, default=0)
    largest = jax.jit(jnp.max, out_shardings=devices.replicated(mesh))
    pending: list[jax.Array] = []

    def ask() -> int:
        own = np.full(mesh.size, max(signals, default=0), np.int32)
        pending.append(largest(devices.place(own, devices.split(mesh))))
        return int(pending.pop(0)) if len(pending) > 1 else 0

    return ask


def leave(code: int) -> None:
    """Leave the others at the end of a program; with a code other than 0 the process ends here.

    Without it a process that has failed would wait for the others, which wait for it.
    """
    if not jax.distributed.is_initialized():
        return
    with within(HEARTBEAT if code == 0 else PATIENCE, code), contextlib.suppress(Exception):
        jax.distributed.shutdown()
    if code:
        _exit(code)


def is_of_others(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, may be that another process is lost."""
    if error is None or count() == 1:
        return False
    if "Gloo" in str(error):  # of whatever type
        return True
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)
    return is_of_others(error.__cause__ or error.__context__)


def lost(error: BaseException) -> None:
    """End this process as another one does not answer, with an error that names that one.

    If it is process 0, JAX ends this one before, with an error that calls it the leader task.
    """
    reason = " ".join(str(error)[:200].splitlines())
    names = " and ".join(f"process {i}" for i in _silent()) or "another process"
    print(
        f"error: {names} of {count()} has ended or does not answer: {reason}",
        file=sys.stderr,
        flush=True,
    )
    if index() == 0:
        time.sleep(PATIENCE)  # the others ask it which one it is
    _exit(1)


def _silent() -> list[int]:
    """The processes that do not tell process 0 within `PATIENCE` seconds that they are here."""
    try:  # JAX has no public way to its key-value store: then JAX's own error has to do
        from jax._src.distributed import global_state

        client: Any = global_state.client
        client.key_value_set(f"here/{index()}", "", allow_overwrite=True)
        time.sleep(PATIENCE)
        here = {int(key.split("/")[-1]) for key, _ in client.key_value_dir_get("here")}
    except jax.errors.JaxRuntimeError:  # process 0, which has the store, does not answer
        return [] if index() == 0 else [0]
    except (ImportError, AttributeError, TypeError):
        time.sleep(HEARTBEAT + PATIENCE)  # JAX ends this process meanwhile
        return []
    return [i for i in range(count()) if i not in here]


@contextlib.contextmanager
def within(seconds: float, code: int = 1, error: BaseException | None = None) -> Iterator[None]:
    """A block that ends the process, with an error if one is given, if it takes longer.

    For what waits for other processes. One process takes its time.
    """
    if not jax.distributed.is_initialized():
        yield
        return

    def end() -> None:
        if error is not None and is_of_others(error):
            lost(error)
        if error is not None:
            print(f"error: {error}", file=sys.stderr)
        _exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exit(code: int) -> None:
    """End at once: the interpreter's own end waits for threads, which may wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _portable(error: Exception) -> Exception:
    """An error that can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _exchange_error(outcome: Any, error: Exception) -> list[Any]:
    """Tell the others of an error; they may be where they do not listen."""
    if is_of_others(error):  # one of them is lost, and an exchange would wait for it
        raise error
    with within(PATIENCE, error=error):
        outcomes = _exchange(outcome)
    error._exchanged = True  # type: ignore[attr-defined]
    return outcomes


def _exchange(value: Any) -> list[Any]:
    """Each process' value."""
    content = np.frombuffer(pickle.dumps(value, protocol=5), np.uint8)
    length = np.frombuffer(content.size.to_bytes(8, "little"), np.uint8)
    lengths = [
        int.from_bytes(each.tobytes(), "little")
        for each in multihost_utils.process_allgather(length)
    ]
    parts: list[list[bytes]] = [[] for _ in lengths]
    for begin in range(0, max(lengths), BLOCK):
        # Of a few sizes, each of which is compiled.
        size = min(BLOCK, 1 << (max(lengths) - begin - 1).bit_length())
        block = np.zeros(size, np.uint8)
        block[: max(0, min(size, content.size - begin))] = content[begin : begin + size]
        for part, sent in zip(parts, multihost_utils.process_allgather(block), strict=True):
            part.append(sent.tobytes())
    return [
        pickle.loads(b"".join(part)[:length]) for part, length in zip(parts, lengths, strict=True)
    ]
