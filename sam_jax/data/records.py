"""Encoded images by number: TensorFlow datasets in array_record files, and folders of images.

Random access is what makes a batch a function of (seed, step): nothing is read but the examples
that it holds, by any process, at any step. docs/data.md compares this with tf.data.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from typing import Any

import numpy as np

from sam_jax import limits, rngs
from sam_jax.data import labels as labels_lib
from sam_jax.data import sources
from sam_jax.errors import UserError, first_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif')
PARTS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Records:
    """Examples that are read one by one.

    Attributes:
      source: has len, and [i] -> (encoded image, its true class, its name); `classes`, the names
        of the classes, where it knows them.
      index: which of them these are, int32 (n,).
      relabel: of `data.labels`: (positions among these, true classes) -> labels.
    """

    source: Any
    index: np.ndarray
    relabel: labels_lib.Relabelling = labels_lib.unchanged

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        """Returns (encoded image, label to train on, name) of the i-th example."""
        encoded, true, name = self.source[int(self.index[i])]
        return encoded, self.relabel(np.array([i]), np.array([true], np.int32))[0], name

    @property
    def labels(self) -> np.ndarray:
        """True classes, int32 (n,); only of a source that knows them without reading its images."""
        return self.source.labels[self.index]

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits of which examples these are; '' where the source does not say."""
        source = getattr(self.source, 'checksum', '')
        index = np.asarray(self.index, '<i8').tobytes()
        return source and hashlib.sha256(source.encode() + index).hexdigest()[:16]

    def part(self, chosen: slice | np.ndarray) -> 'Records':
        return dataclasses.replace(self, index=self.index[chosen])

    def subset(self, chosen: slice | np.ndarray) -> 'Records':
        """Returns the chosen examples with the labels that they have here."""
        places = np.arange(len(self))[chosen]
        return dataclasses.replace(
            self, index=self.index[chosen], relabel=lambda i, true: self.relabel(places[i], true)
        )

    def relabelled(self, relabel: labels_lib.Relabelling) -> 'Records':
        return dataclasses.replace(self, relabel=relabel)


@dataclasses.dataclass(frozen=True)
class Stream:
    """What is known of a dataset of large images before it is opened.

    Attributes:
      tfds_name: TFDS's name.
      num_classes: number of classes.
      train, test: TFDS's splits to train on and to test on.
    """

    tfds_name: str
    num_classes: int
    train: str = 'train'
    test: str = 'test'

    def open(self, data_dir: str) -> tuple['TfdsSource', 'TfdsSource', int]:
        """Returns (training source, test source, class names' number)."""
        train, test = (
            TfdsSource(self.tfds_name, data_dir, split, self.num_classes)
            for split in (self.train, self.test)
        )
        return train, test, self.num_classes


def _entries(folder):
    """What is in a folder, but for hidden names: .ipynb_checkpoints, and ._1.png beside 1.png."""
    return [e for e in os.scandir(folder) if not e.name.startswith('.')]


class FolderStream:
    """A folder in the layout of TFDS's ImageFolder: train/CLASS/IMAGE and test/CLASS/IMAGE."""

    def open(self, data_dir: str) -> tuple['FolderSource', 'FolderSource', int]:
        """As `Stream.open`; the test split is `test`, or else `validation` or `val`."""
        root = os.path.expanduser(data_dir)
        if not data_dir or not os.path.isdir(root):
            raise UserError(
                f"data.dir is {data_dir!r}; with data.name='folder' it must be a folder with "
                'train/CLASS/IMAGE and test/CLASS/IMAGE (or validation, or val).'
            )
        splits = sorted(e.name for e in _entries(root) if e.is_dir())
        test = next((s for s in ('test', 'validation', 'val') if s in splits), None)
        if 'train' not in splits or test is None:
            raise UserError(
                f'data.dir {data_dir!r} holds the folders {", ".join(splits) or "none"}; it needs '
                'train and one of test, validation, val.'
            )
        classes = sorted(
            {
                e.name
                for split in ('train', test)
                for e in _entries(os.path.join(root, split))
                if e.is_dir()
            }
        )
        if len(classes) < 2:
            raise UserError(
                f'data.dir {data_dir!r} has {len(classes)} class folder'
                f'{"s" if not classes else f" ({classes[0]})"}; training needs two or more, '
                'train/CLASS/IMAGE.'
            )
        return (
            FolderSource(os.path.join(root, 'train'), classes),
            FolderSource(os.path.join(root, test), classes),
            len(classes),
        )


STREAMS = {
    'imagenet': Stream('imagenet2012', 1000, test='validation'),
    # Fine-tuning, with the splits of Kornblith et al. 2019; the SAM paper does not say.
    'flowers': Stream('oxford_flowers102', 102, train='train+validation'),
    'cars': Stream('cars196', 196),
    'pets': Stream('oxford_iiit_pet', 37),
    'food101': Stream('food101', 101, test='validation'),
    'birds': Stream('caltech_birds2011', 200),
    # Birdsnap, FGVC-Aircraft, and anything else.
    'folder': FolderStream(),
}


class TfdsSource:
    """A split of a TensorFlow dataset in array_record files."""

    def __init__(self, name, data_dir, split, num_classes):
        import tensorflow_datasets as tfds

        builder = sources.tfds_builder(name, data_dir, 'array_record')
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(
                f'Dataset {name} in {builder.data_dir} is in {builder.info.file_format.value} '
                'files, which cannot be read at random; convert it with `tfds convert_format`, or '
                'prepare it again in another data.dir (TFDS keeps what it has downloaded) with: '
                f'{sources.prepare_command(name, "DIR", "array_record")}'
            )
        sources.tfds_splits(builder, [split])
        self._what = f'{name} ({split})'
        self._num_classes = num_classes
        undecoded = {
            feature: tfds.decode.SkipDecoding()
            for feature, kind in builder.info.features.items()
            if isinstance(kind, tfds.features.Image)
        }
        self._parts = [
            builder.as_data_source(part, decoders=undecoded) for part in split.split('+')
        ]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self):
        return int(self._starts[-1])

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits of what this is a split of."""
        return hashlib.sha256(self._what.encode()).hexdigest()[:16]

    def __getitem__(self, i):
        part = int(np.searchsorted(self._starts, i, side='right')) - 1
        try:
            example = self._parts[part][int(i - self._starts[part])]
        except Exception as e:  # whatever array_record or the parser find wrong
            raise UserError(
                f'Example {i} of {self._what} cannot be read ({first_line(e)}); '
                'prepare the dataset again.'
            ) from e
        label = int(example['label'])
        if not 0 <= label < self._num_classes:
            raise UserError(
                f'Example {i} of {self._what} has the label {label}; labels must be at '
                f'least 0 and below {self._num_classes}, the number of classes.'
            )
        return example['image'], label, f'example {i} of {self._what}'


def _sizes(paths):
    try:
        return [os.path.getsize(path) for path in paths]
    except OSError as e:
        raise UserError(f'{e.filename} cannot be read: {e.strerror}.') from e


class FolderSource:
    """The image files of one split, in an order of their own that mixes the classes.

    Attributes:
      classes: the names of the classes.
      labels: the classes of the images, int32.
    """

    def __init__(self, folder, classes):
        files = []
        for label, name in enumerate(classes):
            place = os.path.join(folder, name)
            if os.path.isdir(place):
                files += [
                    (e.path, label)
                    for e in sorted(_entries(place), key=lambda e: e.name)
                    if e.name.lower().endswith(EXTENSIONS) and not e.is_dir()
                ]
        if not files:
            raise UserError(f'{folder} holds no images CLASS/IMAGE ({", ".join(EXTENSIONS)}).')
        # Mixed once, so that the last tenth (the validation split) is not the last classes.
        self._files = [files[i] for i in rngs.permutation(0, 'folder_order', len(files))]
        self._folder, self.classes = folder, classes
        self.labels = np.array([label for _, label in self._files], np.int32)

    def __len__(self):
        return len(self._files)

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits of the names of the files, classes in them, as first listed."""
        names = (os.fsencode(path[len(self._folder) :]) for path, _ in self._files)
        return hashlib.sha256(b'\n'.join(names)).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Returns 16 hexadecimal digits of the names and sizes of the files, classes in the names.

        Raises:
          UserError: a file is gone.
        """
        digest = hashlib.sha256()
        paths = [path for path, _ in self._files]
        parts = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
        # A network disk takes a millisecond for each of a million files, and many at once.
        with concurrent.futures.ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            for part, sizes in zip(parts, pool.map(_sizes, parts)):
                for path, size in zip(part, sizes):
                    digest.update(f'{path[len(self._folder) :]}\0{size}\n'.encode())
        return digest.hexdigest()[:16]

    def __getitem__(self, i):
        path, label = self._files[i]
        try:
            return limits.read_file(path), label, path
        except OSError as e:
            raise UserError(f'{path} cannot be read: {e.strerror}.') from e
