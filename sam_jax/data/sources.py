"""Datasets that fit in memory: read once from their source into uint8 arrays on the host."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from sam_jax import rngs
from sam_jax.data import decode, files, huggingface
from sam_jax.data.resident import Split
from sam_jax.errors import UserError, first_line


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
      classes: names of the classes; () where they are not known.
    """

    read: Callable[[str], tuple[Split, Split]]
    num_classes: int
    mean: tuple
    std: tuple
    policy: str = 'cifar'
    validation_size: int = 0
    classes: tuple[str, ...] = ()

    def open(self, data_dir: str) -> tuple[Split, Split, 'Source']:
        """Returns (train Split, test Split, the Source itself)."""
        return *self.read(data_dir), self


@dataclasses.dataclass(frozen=True)
class OwnSource:
    """A dataset of anyone's own in `data.dir`: what is to be known of it is found there.

    Attributes:
      read: data_dir -> (train Split, test Split), and the names of the classes if the files say
        them.
    """

    read: Callable[[str], tuple]

    def open(self, data_dir: str) -> tuple[Split, Split, Source]:
        """Reads it.

        The training examples get an order of their own that mixes the classes. The mean and the
        deviation are those of all training images.

        Returns:
          (train Split, test Split, a Source that describes them).

        Raises:
          UserError: fewer than two classes, or a label that is none.
        """
        train, test, *said = self.read(data_dir)
        classes = tuple(said[0]) if said else ()
        num_classes = len(classes) or int(train.labels.max()) + 1
        if num_classes < 2 or (not classes and num_classes > len(train)):
            raise UserError(
                f'The labels in data.dir {data_dir!r} make {num_classes} classes of {len(train)} '
                'training images; they must be counted from 0, and be of two or more classes.'
            )
        for name, split in (('train', train), ('test', test)):
            check_labels(split.labels, num_classes, f'the {name} split in {data_dir!r}')
            split.labels = split.labels.astype(np.int32)
        mean, std = files.moments(train.images)
        # Mixed once, so that the last tenth (the validation split) is not the last classes.
        train = train.part(rngs.permutation(0, 'own_order', len(train)))
        return train, test, Source(self.read, num_classes, mean, std, classes=classes)


def read_digits(data_dir: str) -> tuple[Split, Split]:
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
    counts[np.argsort(counts - shares, kind='stable')[: 500 - counts.sum()]] += 1
    test = np.zeros(len(labels), bool)
    for digit, count in enumerate(counts):
        members = np.flatnonzero(labels == digit)
        test[members[rngs.permutation(0, 'digits_split', len(members), digit)[:count]]] = True
    everything = Split(images, labels)
    # Mixed once, so that the last tenth (the validation split) is not one writer's.
    train = np.flatnonzero(~test)
    train = train[rngs.permutation(0, 'digits_order', len(train))]
    return everything.part(train), everything.part(test)


def tfds_builder(name: str, data_dir: str, file_format: str = '') -> Any:
    """Opens a TensorFlow dataset that lies prepared in `data_dir`.

    Args:
      name: TFDS's name.
      data_dir: '' for TFDS's own folder.
      file_format: which one the message recommends, if any.

    Raises:
      UserError: it is not there; the message says what to run.
    """
    import tensorflow_datasets as tfds

    builder = _prepared(name, data_dir)
    if builder is None:
        shown = data_dir or tfds.core.constants.DATA_DIR
        raise UserError(
            f'Dataset {name} is not in {shown} (config.data.dir is {data_dir!r}); prepare it '
            f'there with: {prepare_command(name, data_dir, file_format)}'
        )
    return builder


def _prepared(name, data_dir):
    """The builder of a TensorFlow dataset if it lies prepared in `data_dir`, or None."""
    import tensorflow_datasets as tfds

    decode.tensorflow()
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) if data_dir else None)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError):
        return None
    return builder if builder.is_prepared() else None


def _may_be_prepared(name, data_dir):
    """Whether a TensorFlow dataset has a folder: what is in it, only TensorFlow's seconds tell."""
    if not importlib.util.find_spec('tensorflow_datasets'):
        return False
    import tensorflow_datasets as tfds

    return (tfds.core.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name).exists()


def prepare_command(name: str, data_dir: str, file_format: str = '') -> str:
    """Returns the shell command that prepares a TensorFlow dataset."""
    where = f", data_dir='{data_dir}'" if data_dir else ''
    form = f", file_format='{file_format}'" if file_format else ''
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}'{where}{form}).download_and_prepare()\""
    )


def tfds_splits(builder: Any, splits: list[str]) -> None:
    """Raises UserError if one of the splits, 'a' or 'a+b', is not on disk."""
    absent = sorted(set('+'.join(splits).split('+')) - set(builder.info.splits))
    if absent:
        raise UserError(
            f'Dataset {builder.name} in {builder.data_dir} has no split {absent[0]}; it has '
            f'{", ".join(sorted(builder.info.splits)) or "none"}.'
        )


def check_split(split: Split, source: Source, what: str) -> None:
    """Checks what a Source has read.

    Raises:
      UserError: no examples, images that are not uint8 (N, H, W, C) or of other channels than the
        Source's mean and std, labels that are not a class for each image.
    """
    images, labels, channels = split.images, split.labels, len(source.mean)
    if not len(split):
        raise UserError(f'The {what} is empty.')
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f'The images of the {what} are {images.dtype} {images.shape}; they must be uint8 '
            '(N, height, width, channels), from 0 to 255.'
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f'The labels of the {what} are {labels.dtype} {labels.shape}; they must be integers, '
            f'one for each of the {len(images)} images.'
        )
    if not images.shape[-1] == channels == len(source.std):
        raise UserError(
            f'The images of the {what} have {images.shape[-1]} channels, and its Source {channels} '
            f'means and {len(source.std)} deviations; it must have one of each a channel.'
        )
    check_labels(labels, source.num_classes, f'the {what}')


def check_labels(labels: np.ndarray, num_classes: int, what: str) -> None:
    """Raises UserError, naming the example, if a label is not in [0, num_classes)."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UserError(
            f'Example {wrong[0]} of {what} has the label {labels[wrong[0]]}; labels must be at '
            f'least 0 and below {num_classes}, the number of classes.'
        )


def read_tfds(name: str, data_dir: str, extra: str = '') -> tuple[Split, Split]:
    """Reads the train and test splits of a TensorFlow dataset that lies prepared in `data_dir`.

    Args:
      name: TFDS's name.
      data_dir: '' for TFDS's own folder.
      extra: name of a further split, put in front of the training split.

    Raises:
      UserError: it is not there; the message says what to run.
    """
    builder = tfds_builder(name, data_dir)
    splits = [*([extra] if extra else []), 'train', 'test']
    tfds_splits(builder, splits)
    *train, test = (_read_split(builder, split) for split in splits)
    images, labels = (
        np.concatenate([getattr(s, part) for s in train])
        if len(train) > 1
        else getattr(train[0], part)
        for part in ('images', 'labels')
    )
    return Split(images, labels), test


def _read_split(builder, split):
    try:
        return _decoded_split(builder, split)
    except Exception as e:  # whatever TensorFlow or array_record find wrong
        raise UserError(
            f'The {split} split of {builder.name} in {builder.data_dir} cannot be read '
            f'({first_line(e)}); prepare it again.'
        ) from e


def _decoded_split(builder, split):
    import tensorflow_datasets as tfds

    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        examples = builder.as_data_source(split)
        images = np.empty((len(examples), *builder.info.features['image'].shape), np.uint8)
        labels = np.empty(len(examples), np.int32)
        for i in range(len(examples)):
            example = examples[i]
            images[i], labels[i] = example['image'], example['label']
        return Split(images, labels)
    arrays = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
    return Split(np.asarray(arrays['image'], np.uint8), np.asarray(arrays['label'], np.int32))


# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = '/usr/share/datasets/fashion-mnist'


def read_fashion_mnist(data_dir: str) -> tuple[Split, Split]:
    """Fashion-MNIST, 28x28x1: of TFDS if it is prepared in `data_dir`, else IDX files in there.

    With no data_dir, TFDS's own folder, and then the place of Debian's package. The training images
    are the same, in another order.

    Raises:
      UserError: there is neither; the message says what to do.
    """
    if _may_be_prepared('fashion_mnist', data_dir) and _prepared('fashion_mnist', data_dir):
        return read_tfds('fashion_mnist', data_dir)
    place = os.path.expanduser(data_dir) if data_dir else DEBIAN_FASHION_MNIST
    if not files.holds_idx(place):
        raise UserError(
            f'Dataset fashion_mnist is not there (config.data.dir is {data_dir!r}): on Debian and '
            'Ubuntu `apt-get install dataset-fashion-mnist` puts it where it is found with '
            "data.dir=''; or put its four IDX files (train-images-idx3-ubyte.gz, ...) into "
            f'data.dir; or prepare it with: {prepare_command("fashion_mnist", data_dir)}'
        )
    train, test = files.read_idx(place)
    for split in (train, test):
        split.labels = split.labels.astype(np.int32)
    return train, test


def read_fake_cifar(data_dir: str) -> tuple[Split, Split]:
    """Random images of CIFAR's shape, 5,000 and 1,000 of them: for benchmarks and smoke runs."""
    del data_dir

    def split(purpose, n):
        pixels = rngs.integers(0, purpose, n * 32 * 32 * 3, 256).astype(np.uint8)
        return Split(pixels.reshape(n, 32, 32, 3), rngs.integers(1, purpose, n, 10))

    return split('fake_train', 5000), split('fake_test', 1000)


CIFAR10_CLASSES = (
    'airplane',
    'automobile',
    'bird',
    'cat',
    'deer',
    'dog',
    'frog',
    'horse',
    'ship',
    'truck',
)
FASHION_MNIST_CLASSES = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)

SOURCES: dict[str, Source | OwnSource] = {
    'digits': Source(read_digits, 10, (0.30533,), (0.37669,), classes=tuple('0123456789')),
    'fake_cifar10': Source(read_fake_cifar, 10, (0.5,) * 3, (0.289,) * 3),
    'cifar10': Source(
        lambda data_dir: read_tfds('cifar10', data_dir),
        10,
        (0.49139968, 0.48215841, 0.44653091),
        (0.24703223, 0.24348513, 0.26158784),
        classes=CIFAR10_CLASSES,
    ),
    'cifar100': Source(
        lambda data_dir: read_tfds('cifar100', data_dir),
        100,
        (0.50707516, 0.48654887, 0.44091784),
        (0.26733429, 0.25643846, 0.27615047),
    ),
    # 73,257 + 531,131 examples; the paper's code validates on train[65929:], without `extra`.
    'svhn': Source(
        lambda data_dir: read_tfds('svhn_cropped', data_dir, extra='extra'),
        10,
        (0.43090966, 0.4302428, 0.44634357),
        (0.19759192, 0.20029082, 0.19811132),
        policy='svhn',
        validation_size=73257 - 65929,
        classes=tuple('0123456789'),
    ),
    # The mean and deviation of MNIST, as in the paper's code.
    'fashion_mnist': Source(
        read_fashion_mnist, 10, (0.1307,), (0.3081,), classes=FASHION_MNIST_CLASSES
    ),
    'idx': OwnSource(files.read_idx),
    'npz': OwnSource(files.read_npz),
    'huggingface': OwnSource(huggingface.read_huggingface),
}
