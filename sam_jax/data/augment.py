"""Augmentation in JAX, run for a whole batch inside the step: the recipes and their parts.

A recipe is a row of names. `augment` carries out those that work on uint8 pixels, `finish` the
normalisation and those that come after it, `mix` mixes pairs of examples. All randomness is a
function of the examples' keys, but for what the original draws once for the whole batch (the place
of cutout, the weight of mixup).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from sam_jax import losses
from sam_jax.data import ops
from sam_jax.data.policies import POLICIES

# Key -> (rows of a table of operations, places of their squares).
Draw = Callable[[jax.Array], tuple[jax.Array, jax.Array]]

# The names that config.data.augment may take, and who uses them.
RECIPES = {
    'none': (),
    'basic': ('flip', 'shift'),  # the SAM paper's "Basic"
    'cutout': ('flip', 'shift', 'cutout'),  # its "Cutout"; on Fashion-MNIST its "Auto augment"
    'autoaugment': ('autoaugment', 'flip', 'shift'),  # its code's README, "AA" on CIFAR
    'autoaugment_cutout': ('autoaugment', 'flip', 'shift', 'cutout'),  # AutoAugment's own code
    'autoaugment_only': ('autoaugment',),
    'autoaugment_only_cutout': ('autoaugment', 'cutout'),  # its "Auto augment" on SVHN
    'randaugment': ('randaugment', 'flip', 'shift'),
    # Of large images: a random part of the image, resized (by the streaming path, on the host).
    'imagenet': ('resized_crop', 'flip'),  # the SAM paper's on ImageNet
    'imagenet_autoaugment': ('resized_crop', 'flip', 'autoaugment'),
    'imagenet_randaugment': ('resized_crop', 'flip', 'randaugment'),
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A recipe with its numbers.

    Attributes:
      recipe: one of RECIPES.
      padding: pixels of the shift crop.
      policy: AutoAugment's, one of POLICIES.
      corrected: use `ops.corrected` in place of the original's constants and quirks.
      cutout_size: side of the square that cutout empties, in pixels.
      cutout_per_image: a place for each image (DeVries and Taylor) in place of one for the whole
        batch (the SAM paper's code).
      cutout_probability: chance of a square: of each image, or of the batch.
      randaugment_layers, randaugment_magnitude: RandAugment's N and M.
      mixup_alpha, cutmix_alpha: of `mix`; 0 for none.
      mix_per_image: a weight for each image in place of one for the whole batch.
      image_size: side to which `enlarge` resizes at the end; 0 to leave the images as they are.
    """

    recipe: str
    padding: int = 4
    policy: str = 'cifar'
    corrected: bool = False
    cutout_size: int = 16
    cutout_per_image: bool = False
    cutout_probability: float = 1.0
    randaugment_layers: int = 2
    randaugment_magnitude: int = 9
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_per_image: bool = False
    image_size: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        return RECIPES[self.recipe]


def augment(images: jax.Array, keys: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Carries out the parts of a recipe that work on pixels.

    Args:
      images: uint8 (N, H, W, C).
      keys: one an image, (N,).
      augmentation: Augmentation.

    Returns:
      uint8 (N, H, W, C).
    """
    parts = augmentation.parts
    policies = [part for part in parts if part in ('autoaugment', 'randaugment')]
    for policy in policies:
        constants = (
            ops.corrected(min(images.shape[1:3]))
            if augmentation.corrected
            else ops.FAITHFUL
            if policy == 'autoaugment'
            else ops.FAITHFUL_RANDAUGMENT
        )
        if policy == 'autoaugment':
            table, draw = autoaugment(POLICIES[augmentation.policy], images.shape[1:], constants)
        else:
            table, draw = randaugment(
                augmentation.randaugment_layers,
                augmentation.randaugment_magnitude,
                images.shape[1:],
                constants,
            )
        policy_keys = jax.vmap(functools.partial(jax.random.fold_in, data=1))(keys)
        images = apply_ops(images, table, *jax.vmap(draw)(policy_keys))
    if 'flip' in parts:
        # Whether before or after a policy is all one: its operations have signs at random.
        padding = augmentation.padding if 'shift' in parts else 0
        images = jax.vmap(functools.partial(basic, padding=padding))(images, keys)
    return images


def finish(
    images: jax.Array,
    keys: jax.Array,
    batch_key: jax.Array,
    augmentation: Augmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> jax.Array:
    """Normalises, and empties cutout's squares: 0 there, which is the mean colour.

    Args:
      images: uint8 (N, H, W, C).
      keys: one an image, (N,).
      batch_key: one for the whole global batch.
      augmentation: Augmentation.
      mean, std: of `normalize`.
    """
    shape = images.shape[1:3]
    images = normalize(images, mean, std)
    if 'cutout' not in augmentation.parts:
        return images
    size = augmentation.cutout_size

    def place(key, place_key):
        center = _center(place_key, shape)
        if augmentation.cutout_probability == 1:
            return center
        drawn = jax.random.bernoulli(jax.random.fold_in(key, 4), augmentation.cutout_probability)
        return jnp.where(drawn, center, -size)  # a square outside of the image is none

    if augmentation.cutout_per_image:
        centers = jax.vmap(lambda key: place(key, jax.random.fold_in(key, 2)))(keys)
        return jax.vmap(functools.partial(cutout, size=size))(images, centers)
    center = place(batch_key, batch_key)
    return jax.vmap(lambda image: cutout(image, center, size))(images)


# Flip and shift


def flip(image: jax.Array, flipped: ArrayLike) -> jax.Array:
    """Mirrors the image (H, W, C) left to right where `flipped` is true."""
    return jnp.where(flipped, image[:, ::-1], image)


def shift(image: jax.Array, padding: int, dy: ArrayLike, dx: ArrayLike) -> jax.Array:
    """Pads by reflection and crops back to (H, W, C) at offset (dy, dx) in [0, 2 padding]."""
    padded = jnp.pad(image, [(padding, padding), (padding, padding), (0, 0)], mode='reflect')
    return jax.lax.dynamic_slice(padded, (dy, dx, 0), image.shape)


def basic(image: jax.Array, key: jax.Array, padding: int) -> jax.Array:
    """The paper's basic recipe: flip with probability 1/2, then a uniformly random shift crop."""
    flip_key, y_key, x_key = jax.random.split(key, 3)
    flipped = jax.random.bernoulli(flip_key)
    if not padding:
        return flip(image, flipped)
    dy = jax.random.randint(y_key, (), 0, 2 * padding + 1)
    dx = jax.random.randint(x_key, (), 0, 2 * padding + 1)
    return lax.platform_dependent(
        image,
        flipped,
        dy,
        dx,
        tpu=lambda *args: flip_and_shift(*args, padding),
        default=lambda image, flipped, dy, dx: shift(flip(image, flipped), padding, dy, dx),
    )


def flip_and_shift(
    image: jax.Array, flipped: ArrayLike, dy: ArrayLike, dx: ArrayLike, padding: int
) -> jax.Array:
    """`shift` of `flip`, as a matrix product for the rows and one for the columns.

    On a TPU crops at places of their own are a loop over the images. bfloat16 has all integers up
    to 256, and of a sum all terms but one are 0: this is exact.
    """

    def selection(size, offset, mirrored):
        # Which pixel (second axis) comes to a place (first axis).
        period = max(2 * size - 2, 1)
        source = (jnp.arange(size) + offset - padding) % period
        source = jnp.minimum(source, period - source)
        source = jnp.where(mirrored, size - 1 - source, source)
        return (source[:, None] == jnp.arange(size)[None]).astype(jnp.bfloat16)

    rows, columns = selection(image.shape[0], dy, False), selection(image.shape[1], dx, flipped)
    moved = jnp.einsum('yh,hwc->ywc', rows, image.astype(jnp.bfloat16))
    return jnp.einsum('xw,ywc->yxc', columns, moved).astype(image.dtype)


# Policies: a table of operations, of which each image gets some


def autoaugment(
    policy: tuple, shape: tuple[int, ...], constants: ops.Constants
) -> tuple[ops.Op, Draw]:
    """Returns (table, draw) of an AutoAugment policy.

    Args:
      policy: of `policies`: a line is two operations, (name, chance, level) each.
      shape: (H, W, C) of the images.
      constants: ops.Constants.

    Returns:
      table: ops.Op of all operations, stacked; the first does nothing.
      draw: key -> (rows of the table (2,), places (2, 2) for the squares of its Cutout). A line is
        chosen uniformly, each operation done with its chance, its sign turned with chance 1/2.
    """
    table = [
        ops.resolve('Identity', 0, False, shape, constants),
        *(
            ops.resolve(name, level, negative, shape, constants)
            for line in policy
            for name, _, level in line
            for negative in (False, True)
        ),
    ]
    chances = np.array([[chance for _, chance, _ in line] for line in policy], np.float32)

    def draw(key):
        line_key, chance_key, sign_key, place_key = jax.random.split(key, 4)
        line = jax.random.randint(line_key, (), 0, len(policy))
        done = jax.random.bernoulli(chance_key, jnp.asarray(chances)[line])
        sign = jax.random.bernoulli(sign_key, shape=(2,)).astype(jnp.int32)
        chosen = 1 + 4 * line + 2 * jnp.arange(2, dtype=jnp.int32) + sign
        return jnp.where(done, chosen, 0), jax.random.uniform(place_key, (2, 2), jnp.float32)

    return _stack(table), draw


def randaugment(
    layers: int, magnitude: int, shape: tuple[int, ...], constants: ops.Constants
) -> tuple[ops.Op, Draw]:
    """Returns (table, draw) of RandAugment (Cubuk et al. 2020): `layers` operations, each uniform.

    All have the same magnitude; signs are turned with chance 1/2. As `autoaugment` otherwise.
    """
    table = [
        ops.resolve(name, magnitude, negative, shape, constants)
        for name in ops.NAMES
        for negative in (False, True)
    ]

    def draw(key):
        op_key, sign_key, place_key = jax.random.split(key, 3)
        chosen = jax.random.randint(op_key, (layers,), 0, len(ops.NAMES))
        sign = jax.random.bernoulli(sign_key, shape=(layers,)).astype(jnp.int32)
        return 2 * chosen + sign, jax.random.uniform(place_key, (layers, 2), jnp.float32)

    return _stack(table), draw


def _stack(table):
    return jax.tree.map(lambda *x: np.stack(x), *table)


def apply_ops(images: jax.Array, table: ops.Op, rows: jax.Array, places: jax.Array) -> jax.Array:
    """Carries out on each image the operations of its rows of the table, one after the other.

    On CPU image after image, each in the branch of its operation alone; elsewhere all images at
    once, in all branches. A TPU reads by comparison, see `ops`.

    Args:
      images: uint8 (N, H, W, C).
      table: ops.Op of NumPy arrays, stacked.
      rows: int32 (N, L).
      places: (N, L, 2) uniform numbers, for Cutout.
    """
    return lax.platform_dependent(
        images,
        rows,
        places,
        cpu=functools.partial(one_by_one, table),
        tpu=functools.partial(all_at_once, table, False),
        default=functools.partial(all_at_once, table, True),
    )


def one_by_one(table: ops.Op, images: jax.Array, rows: jax.Array, places: jax.Array) -> jax.Array:
    """`apply_ops` in a loop over the images."""
    return lax.map(lambda args: _apply_rows(table, True, *args), (images, rows, places))


def all_at_once(
    table: ops.Op, indexed: bool, images: jax.Array, rows: jax.Array, places: jax.Array
) -> jax.Array:
    """`apply_ops` for all images together, where values are read by index or by comparison."""
    return jax.vmap(functools.partial(_apply_rows, table, indexed))(images, rows, places)


def _apply_rows(table, indexed, image, rows, places):
    for i in range(rows.shape[0]):
        image = ops.apply(ops.pick(table, rows[i], indexed), image, places[i], indexed)
    return image


# After the pixels


def _center(key, shape):
    return jnp.stack(
        [jax.random.randint(k, (), 0, n) for k, n in zip(jax.random.split(key), shape)]
    )


def cutout(image: jax.Array, center: jax.Array, size: int) -> jax.Array:
    """Zeroes the square of side `size` around the pixel `center` (y, x), cut at the border.

    It begins size // 2 above and to the left of the pixel. Source: DeVries and Taylor 2017.
    """
    inside = True
    for axis in (0, 1):
        place = lax.broadcasted_iota(jnp.int32, image.shape, axis)
        low = center[axis] - size // 2
        inside &= (place >= low) & (place < low + 2 * (size // 2))
    return jnp.where(inside, jnp.zeros((), image.dtype), image)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Returns (images / 255 - mean) / std in float: uint8 (..., C), mean and std of length C.

    Float is float32, or float64 where that is enabled.
    """
    mean, std = jnp.asarray(mean, dtype=float), jnp.asarray(std, dtype=float)
    shape = (1,) * (images.ndim - 1) + (-1,)
    return (images.astype(mean.dtype) / 255.0 - mean.reshape(shape)) / std.reshape(shape)


# Pairs of examples


def mix(
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    batch_key: jax.Array,
    augmentation: Augmentation,
    num_classes: int,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with the one at the mirrored place of the global batch.

    With w ~ Beta(alpha, alpha), one for the batch or one an image:
    mixup (Zhang et al. 2018): w' x + (1 - w') x', w' = max(w, 1 - w) as in the SAM paper's code;
    cutmix (Yun et al. 2019): a box of sides sqrt(1 - w), cut at the border, is taken from x', and
    w' is the share of the image outside of it. Labels become w' y + (1 - w') y'.

    Args:
      images: normalised, float (N, H, W, C).
      labels: int32 (N,) or distributions (N, num_classes).
      keys: one an image, (N,).
      batch_key: one for the whole global batch.
      augmentation: Augmentation.
      num_classes: width of the distributions.
      axis_name: of the devices that share the global batch; None if all of it is here.

    Returns:
      (images, labels): unchanged where neither alpha is positive.
    """
    alpha = augmentation.mixup_alpha or augmentation.cutmix_alpha
    if not alpha:
        return images, labels
    targets = losses.target_distribution(labels, num_classes, images.dtype)
    draw = functools.partial(_mixing, alpha=alpha, shape=images.shape[1:3], dtype=images.dtype)
    if augmentation.mix_per_image:
        weights, centers = jax.vmap(draw)(jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys))
    else:
        drawn = draw(jax.random.fold_in(batch_key, 3))
        weights, centers = (jnp.broadcast_to(x, (len(images), *x.shape)) for x in drawn)
    others, other_targets = (mirrored(x, axis_name) for x in (images, targets))
    if augmentation.mixup_alpha:
        weights = jnp.maximum(weights, 1 - weights)
        images, weights = jax.vmap(mixup)(images, others, weights)
    else:
        images, weights = jax.vmap(cutmix)(images, others, weights, centers)
    return images, weights[:, None] * targets + (1 - weights[:, None]) * other_targets


def _mixing(key, alpha, shape, dtype):
    weight_key, center_key = jax.random.split(key)
    return jax.random.beta(weight_key, alpha, alpha, dtype=dtype), _center(center_key, shape)


def mirrored(x: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Reverses the order of the global batch, which the devices of an axis hold in rows."""
    x = x[::-1]
    if axis_name is None:
        return x
    n = lax.axis_size(axis_name)
    return lax.ppermute(x, axis_name, [(i, n - 1 - i) for i in range(n)])


def mixup(image: jax.Array, other: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (weight image + (1 - weight) other, weight)."""
    return weight * image + (1 - weight) * other, weight


def cutmix(
    image: jax.Array, other: jax.Array, weight: jax.Array, center: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (the image with a box of the other one around `center`, its share outside of it)."""
    inside = True
    share = 1.0
    for axis, n in enumerate(image.shape[:2]):
        place = lax.broadcasted_iota(jnp.int32, image.shape, axis)
        side = jnp.floor(n * jnp.sqrt(1 - weight)).astype(jnp.int32)
        low = jnp.maximum(center[axis] - side // 2, 0)
        high = jnp.minimum(center[axis] + side // 2, n)
        inside &= (place >= low) & (place < high)
        share *= (high - low) / n
    return jnp.where(inside, other, image), (1 - share).astype(image.dtype)


# Size


def enlarge(images: jax.Array, size: int) -> jax.Array:
    """Resizes float images (N, H, W, C) to (N, size, size, C) by TensorFlow's v1 bicubic kernel.

    For fine-tuning on small images, as the SAM paper's code; size 0 leaves them as they are.
    """
    if not size:
        return images
    vertical, horizontal = (jnp.asarray(_bicubic(n, size), images.dtype) for n in images.shape[1:3])
    return jnp.einsum('yh,nhwc,xw->nyxc', vertical, images, horizontal, precision='highest')


def _bicubic(n, size):
    # tf.compat.v1.image.resize_bicubic without half-pixel centres: Keys' kernel with a = -0.75, its
    # argument rounded to 1/1024; what lies beyond the border is the border's pixel.
    place = np.arange(size, dtype=np.float32) * np.float32(n / size)
    cell = np.floor(place)
    fraction = np.rint((place - cell) * 1024) / 1024
    a, matrix = -0.75, np.zeros((size, n))
    for tap in (-1, 0, 1, 2):
        x = np.abs(fraction - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        source = np.clip(cell + tap, 0, n - 1).astype(int)
        np.add.at(matrix, (np.arange(size), source), np.where(x <= 1, near, far))
    return matrix
