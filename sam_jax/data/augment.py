"""Augmentation in JAX: functions of one image and a key, run for a whole batch inside the step."""

import jax
import jax.numpy as jnp


def flip(image, flipped):
    """Mirrors the image (H, W, C) left to right where `flipped` is true."""
    return jnp.where(flipped, image[:, ::-1], image)


def shift(image, padding, dy, dx):
    """Pads by reflection and crops back to (H, W, C) at offset (dy, dx) in [0, 2 padding]."""
    padded = jnp.pad(image, [(padding, padding), (padding, padding), (0, 0)], mode='reflect')
    return jax.lax.dynamic_slice(padded, (dy, dx, 0), image.shape)


def basic(image, key, padding):
    """The paper's basic recipe: flip with probability 1/2, then a uniformly random shift crop."""
    flip_key, y_key, x_key = jax.random.split(key, 3)
    image = flip(image, jax.random.bernoulli(flip_key))
    dy = jax.random.randint(y_key, (), 0, 2 * padding + 1)
    dx = jax.random.randint(x_key, (), 0, 2 * padding + 1)
    return shift(image, padding, dy, dx)


def none(image, key, padding):
    """No augmentation."""
    del key, padding
    return image


# The names that config.data.augment may take.
RECIPES = {'none': none, 'basic': basic}


def normalize(images, mean, std):
    """Returns (images / 255 - mean) / std in float: uint8 (..., C), mean and std of length C.

    Float is float32, or float64 where that is enabled.
    """
    mean, std = jnp.asarray(mean, dtype=float), jnp.asarray(std, dtype=float)
    shape = (1,) * (images.ndim - 1) + (-1,)
    return (images.astype(mean.dtype) / 255.0 - mean.reshape(shape)) / std.reshape(shape)
