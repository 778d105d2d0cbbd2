"""Datasets that fit in memory: read once from their source into uint8 arrays on the host."""

import dataclasses
import os

import numpy as np

from sam_jax import rngs
from sam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples on the host: images uint8 (N, H, W, C), labels int32 (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def part(self, chosen):
        return Split(self.images[chosen], self.labels[chosen])


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of a dataset before it is read.

    Attributes:
      read: data_dir -> (train Split, test Split).
      num_classes: number of classes.
      mean, std: of the training images / 255, per channel.
      policy: AutoAugment's policy for it.
      validation_size: how many of the last training examples are held out when asked for; 0 for a
        tenth.
    """

    read: object
    num_classes: int
    mean: tuple
    std: tuple
    policy: str = 'cifar'
    validation_size: int = 0


def read_digits(data_dir):
    """scikit-learn's handwritten digits: 1,797 real images, 8x8x1; a fixed split of 1,297/500.

    The split is stratified: each class gives its share of the 500 (largest remainders), chosen by a
    permutation that depends on nothing but the class.
    """
    del data_dir
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    shares = np.bincount(labels) * 500 / len(labels)
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind='stable')[:500 - counts.sum()]] += 1
    test = np.zeros(len(labels), bool)
    for digit, count in enumerate(counts):
        members = np.flatnonzero(labels == digit)
        test[members[rngs.permutation(0, 'digits_split', len(members), digit)[:count]]] = True
    everything = Split(images, labels)
    # Mixed once, so that the last tenth (the validation split) is not one writer's.
    train = np.flatnonzero(~test)
    train = train[rngs.permutation(0, 'digits_order', len(train))]
    return everything.part(train), everything.part(test)


def read_tfds(name, data_dir, extra=''):
    """Reads the train and test splits of a TensorFlow dataset that lies prepared in `data_dir`.

    Args:
      name: TFDS's name.
      data_dir: '' for TFDS's own folder.
      extra: name of a further split, put in front of the training split.

    Raises:
      UserError: it is not there; the message says what to run.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # TensorFlow only reads files here; the accelerator's memory is JAX's.
    tf.config.set_visible_devices([], 'GPU')
    place = os.path.expanduser(data_dir) if data_dir else None
    shown = data_dir or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(name, data_dir=place)
        missing = not builder.is_prepared()
    except (tfds.core.DatasetNotFoundError, FileNotFoundError):
        missing = True
    if missing:
        where = f", data_dir='{data_dir}'" if data_dir else ''
        raise UserError(
            f'Dataset {name} is not in {shown} (config.data.dir is {data_dir!r}); prepare it '
            f'there with: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}'{where}).download_and_prepare()\"")

    def read(split):
        arrays = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
        return Split(np.asarray(arrays['image'], np.uint8), np.asarray(arrays['label'], np.int32))

    train = read('train')
    if extra:
        more = read(extra)
        train = Split(np.concatenate([more.images, train.images]),
                      np.concatenate([more.labels, train.labels]))
    return train, read('test')


def read_fake_cifar(data_dir):
    """Random images of CIFAR's shape, 5,000 and 1,000 of them: for benchmarks and smoke runs."""
    del data_dir

    def split(purpose, n):
        pixels = rngs.integers(0, purpose, n * 32 * 32 * 3, 256).astype(np.uint8)
        return Split(pixels.reshape(n, 32, 32, 3), rngs.integers(1, purpose, n, 10))

    return split('fake_train', 5000), split('fake_test', 1000)


SOURCES = {
    'digits': Source(read_digits, 10, (0.30533,), (0.37669,)),
    'fake_cifar10': Source(read_fake_cifar, 10, (0.5,) * 3, (0.289,) * 3),
    'cifar10': Source(
        lambda data_dir: read_tfds('cifar10', data_dir), 10,
        (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    'cifar100': Source(
        lambda data_dir: read_tfds('cifar100', data_dir), 100,
        (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    # 73,257 + 531,131 examples; the paper's code validates on train[65929:], without `extra`.
    'svhn': Source(
        lambda data_dir: read_tfds('svhn_cropped', data_dir, extra='extra'), 10,
        (0.43090966, 0.4302428, 0.44634357), (0.19759192, 0.20029082, 0.19811132),
        policy='svhn', validation_size=73257 - 65929),
    'fashion_mnist': Source(
        lambda data_dir: read_tfds('fashion_mnist', data_dir), 10, (0.1307,), (0.3081,)),
}


def split_validation(train, size=0):
    """Returns (train without its last `size` examples or tenth, those), as the paper's code."""
    cut = len(train) - (size or len(train) // 10)
    return train.part(slice(None, cut)), train.part(slice(cut, None))


# What becomes of a label that is hit by noise: (true label, a draw, number of classes) -> label.
LABEL_NOISE = {
    # Any class, the true one included (MentorNet's convention; the SAM paper does not say): about
    # rate x (1 - 1 / number of classes) of the labels end up wrong.
    'uniform': lambda true, draw, n: draw % n,
    # Any other class.
    'other': lambda true, draw, n: (true + 1 + draw % (n - 1)) % n,
    # The next class: each is taken for one other ("pair flip", asymmetric noise).
    'pair': lambda true, draw, n: (true + 1) % n,
}


def add_label_noise(train, rate, num_classes, seed, kind='uniform'):
    """Gives a fraction `rate` of the examples another label.

    Args:
      train: Split.
      rate: exactly round(rate N) examples are hit.
      num_classes: number of classes.
      seed: decides which examples, and what they get.
      kind: one of LABEL_NOISE.
    """
    n = len(train)
    noisy = rngs.permutation(seed, 'noisy_examples', n)[:round(rate * n)]
    draws = rngs.integers(seed, 'noisy_labels', n, num_classes * (num_classes - 1))
    labels = train.labels.copy()
    labels[noisy] = LABEL_NOISE[kind](train.labels, draws, num_classes)[noisy]
    return Split(train.images, labels)
