"""The devices of a run: a mesh over them, and what of each array is where.

A batch is split over the devices along its first axis. What all of them need is copied to each: the
state, and a data set that stays on the devices. XLA adds what has to be added over all of them.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(n: int | None = None) -> Mesh | None:
    """A mesh over the first n devices, by default over all; None for one, which needs no mesh.

    Raises:
        ValueError: there are fewer devices.
    """
    devices = jax.devices()
    n = len(devices) if n is None else n
    if not 1 <= n <= len(devices):
        raise ValueError(f"--devices {n}: jax finds {len(devices)}: {devices[:8]}")
    if n == 1:
        return None
    return jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,), devices=devices[:n])


def memory() -> int:
    """Bytes of the first device, or of the computer if the device does not say."""
    if limit := (jax.devices()[0].memory_stats() or {}).get("bytes_limit"):
        return limit
    if not hasattr(os, "sysconf"):  # Windows
        return 8_000_000_000
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def replicated(mesh: Mesh) -> NamedSharding:
    """Entire on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Split along the first axis, whose length must be a multiple of the number of devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """A tree of arrays, entire on each device; without a mesh on JAX's default one."""
    return jax.device_put(tree, None if mesh is None else replicated(mesh))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """How `shard` splits a tree of arrays, or of their shapes."""

    def of(x: Any) -> NamedSharding:
        shared = [i for i, n in enumerate(x.shape) if n % mesh.size == 0]
        if x.size < 4096 or not shared:
            return replicated(mesh)
        longest = max(shared, key=lambda i: x.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, mesh.axis_names))

    return jax.tree.map(of, tree)


def shard(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays, each split over the devices along its longest axis that they can share.

    For a state that does not fit on one device (FSDP, ZeRO): each holds about 1/n of it, and XLA
    gathers an array where a layer needs it. Arrays of less than 4096 entries are copied to each.
    """
    return jax.device_put(tree, shardings(tree, mesh))


def spread(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays on all devices of a mesh: as they are if they are there, else replicated."""
    everywhere = set(mesh.devices.flat)

    def is_there(sharding: Any) -> bool:
        return sharding is not None and sharding.device_set == everywhere

    # Of hundreds of arrays most have the same sharding: a step that looked at each took 3 times
    # as long for it.
    if all(map(is_there, {getattr(x, "sharding", None) for x in jax.tree.leaves(tree)})):
        return tree

    def place(x: Any) -> Any:
        there = is_there(getattr(x, "sharding", None))
        return x if there else jax.device_put(x, replicated(mesh))

    return jax.tree.map(place, tree)


def put(batch: Mapping[str, Any], mesh: Mesh | None) -> Mapping[str, Any]:
    """A batch on the devices of a mesh; without one as it is.

    It gets copies of rows, of weight 0, until the devices have equally many. Of a data set whose
    rows are in `index` only these are split; the data set itself is copied to each device, unless
    it is on all of them already, in whatever way.
    """
    if mesh is None:
        return batch
    n = len(batch["weight"])
    rows = np.resize(np.arange(n), n + -n % mesh.size)
    entire = {"image", "mask", "pixel_weight"} if "index" in batch else set()

    def place(name: str, array: Any) -> Any:
        if name in entire:
            return spread(array, mesh)
        if len(rows) > n:
            array = array[rows]
            if name == "weight":
                array = jnp.where(np.arange(len(rows)) < n, array, 0)
        return jax.device_put(array, split(mesh))

    return {name: place(name, array) for name, array in batch.items()}


def first_rows(result: Any, n: int, rows: int) -> Any:
    """A tree without what `put` added to a batch of n: arrays of `rows` rows are cut."""
    if rows == n:
        return result
    return jax.tree.map(lambda x: x[:n] if x.ndim and len(x) == rows else x, result)
