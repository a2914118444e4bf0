"""The devices of a run: a mesh over them, and how each array is placed on it.

A batch is split over the devices along its first axis. What all of them need is copied to each: the
state, and a data set that stays on the devices. XLA adds what has to be added over all of them.

A mesh may have devices of several processes, see `processes`. An array on it is then made from what
each process has in memory, the same in all of them, and each copies what its own devices need.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(n: int | None = None) -> Mesh | None:
    """A mesh over the first n devices, by default over all; None for one, which needs no mesh.

    Raises:
        ValueError: there are fewer devices; or n is given to one of several processes, which use
            all of theirs.
    """
    devices = jax.devices()
    if n is not None and jax.process_count() > 1:
        raise ValueError("--devices: several processes use all of their devices")
    n = len(devices) if n is None else n
    if not 1 <= n <= len(devices):
        raise ValueError(f"--devices {n}: jax finds {len(devices)}: {devices[:8]}")
    if n == 1:
        return None
    return jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,), devices=devices[:n])


def memory() -> int:
    """Bytes of the first device here, or of the computer if the device does not say."""
    if limit := (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"):
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
    sharding = None if mesh is None else replicated(mesh)
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: place(x, sharding), tree)


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that is on all devices of a sharding already, or in the memory of each process."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if not is_here(x):
        same = x.sharding.is_equivalent_to(sharding, x.ndim)
        return x if same else jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        bits = place(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
    # `device_put` would compare the arrays of all processes.
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def is_here(x: Any) -> bool:
    """Whether this process has an entire array, on its devices or in memory."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def here(x: Any) -> Any:
    """What this process has of an array that is split along its first axis, or all of it."""
    if is_here(x):
        return x
    if x.is_fully_replicated:
        return x.addressable_data(0)
    return np.concatenate([np.asarray(shard.data) for shard in x.addressable_shards])


def entire(tree: Any) -> Any:
    """A tree with arrays that this process has alone; all processes must call this."""

    def of(x: Any) -> Any:
        return here(x) if is_here(x) or x.is_fully_replicated else on_host(x)

    return jax.tree.map(of, tree)


def on_host(x: Any) -> np.ndarray:
    """An entire array as one of NumPy. All processes must call this."""
    if is_here(x) or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


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
    return jax.tree.map(place, tree, shardings(tree, mesh))


def abstract(tree: Any, mesh: Mesh, *, split: bool) -> Any:
    """Shapes and types of a tree, with places as of `shard` or of `replicate`."""
    places = shardings(tree, mesh) if split else jax.tree.map(lambda _: replicated(mesh), tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, places
    )


def spread(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays on all devices of a mesh: as they are if they are there, else replicated."""
    everywhere = set(mesh.devices.flat)

    def is_there(sharding: Any) -> bool:
        return sharding is not None and sharding.device_set == everywhere

    # Hundreds of arrays have few shardings between them: most steps end here.
    if all(map(is_there, {getattr(x, "sharding", None) for x in jax.tree.leaves(tree)})):
        return tree

    def spread_one(x: Any) -> Any:
        return x if is_there(getattr(x, "sharding", None)) else place(x, replicated(mesh))

    return jax.tree.map(spread_one, tree)


def put(batch: Mapping[str, Any], mesh: Mesh | None) -> Mapping[str, Any]:
    """A batch on the devices of a mesh; without one as it is.

    Rows of weight 0 are added until each device has equally many. If the batch has an `index`, only
    `index` and `weight` are split: the data set is copied to each device, unless it is on all of
    them already. What `join` has put together stays as it is.
    """
    if mesh is None:
        return batch
    n = len(batch["weight"])
    rows = np.resize(np.arange(n), n + -n % mesh.size)
    entire = {"image", "mask", "pixel_weight"} if "index" in batch else set()

    def put_one(name: str, array: Any) -> Any:
        if name in entire:
            return spread(array, mesh)
        if not is_here(array):
            return array
        if len(rows) > n:
            array = array[rows]
            if name == "weight":
                array = jnp.where(np.arange(len(rows)) < n, array, 0)
        return place(array, split(mesh))

    return {name: put_one(name, array) for name, array in batch.items()}


def rows_here(n: int, mesh: Mesh | None) -> np.ndarray | None:
    """Which rows of a batch of n, filled as by `put`, this process feeds to its devices.

    None if they are all on devices of this process.
    """
    if mesh is None or split(mesh).is_fully_addressable:
        return None
    total = n + -n % mesh.size
    parts = split(mesh).addressable_devices_indices_map((total,)).values()
    return np.unique([row for part in parts if part for row in range(total)[part[0]]])


def join(part: np.ndarray, n: int, mesh: Mesh) -> jax.Array:
    """A batch of n rows, filled as by `put`, of which each process has its `rows_here`."""
    shape = (n + -n % mesh.size, *part.shape[1:])
    return jax.make_array_from_process_local_data(split(mesh), part, shape)


def first_rows(result: Any, n: int, rows: int) -> Any:
    """A tree without what `put` added to a batch of n: arrays of `rows` rows are cut."""
    if rows == n:
        return result
    return jax.tree.map(lambda x: x[:n] if x.ndim and len(x) == rows else x, result)
