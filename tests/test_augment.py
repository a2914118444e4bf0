import jax
import jax.numpy as jnp
import numpy as np

from flax_unet.augment import random_flips


def pictures(n):
    image = jax.random.bits(jax.random.key(1), (n, 5, 7, 3), jnp.uint8)
    return image, (image[..., :1] > 128).astype(jnp.uint8)


def test_each_image_is_one_of_its_four_mirrorings_and_its_mask_the_same():
    image, mask = pictures(400)
    flipped, flipped_mask = jax.jit(random_flips)(jax.random.key(0), image, mask)
    assert (flipped.dtype, flipped_mask.dtype) == (jnp.uint8, jnp.uint8)
    seen = np.zeros(4, int)
    for x, m, y, n in zip(*map(np.asarray, (image, mask, flipped, flipped_mask)), strict=True):
        ways = [
            (x, m),
            (x[::-1], m[::-1]),
            (x[:, ::-1], m[:, ::-1]),
            (x[::-1, ::-1], m[::-1, ::-1]),
        ]
        way = [i for i, (a, b) in enumerate(ways) if (a == y).all() and (b == n).all()]
        assert len(way) == 1
        seen[way[0]] += 1
    assert (abs(seen - 100) < 40).all()  # more than four standard deviations


def test_an_image_alone_is_flipped_as_in_a_batch():
    image, mask = pictures(6)
    key = jax.random.key(3)
    together = random_flips(key, image, mask)
    alone = random_flips(key, image[:1], mask[:1])
    np.testing.assert_array_equal(together[0][:1], alone[0])
    np.testing.assert_array_equal(together[1][:1], alone[1])
