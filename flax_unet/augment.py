"""Random changes of the training pictures, on the device: jitted, batched, image and mask as one.

An augmentation is a function `(key, image, mask) -> (image, mask)` of a batch. Each image has a key
of its own, so it is changed alike whatever the batch around it.
"""

import jax
import jax.numpy as jnp


def random_flips(key: jax.Array, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirror each image with its mask, left to right and top to bottom, with probability 1/2 each.

    Args:
        key: a PRNG key.
        image: [B, H, W, C], of any type.
        mask: [B, H, W, K], of any type.
    """

    def flip(key: jax.Array, x: jax.Array) -> jax.Array:
        upside_down, mirrored = jax.random.bernoulli(key, shape=(2,))
        x = jnp.where(upside_down, x[::-1], x)
        return jnp.where(mirrored, x[:, ::-1], x)

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(image)))
    return jax.vmap(flip)(keys, image), jax.vmap(flip)(keys, mask)
