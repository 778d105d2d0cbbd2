"""Prompt learning, CoOp (Zhou et al., IJCV 2022): learned words in front of the names of classes.

The logit of a class is CLIP's similarity of the image and the text

    [start] v_1 ... v_n [tokens of the class's name] . [end]

in which the vectors v, the context, are the same for all classes and are all that is trained. The
towers of CLIP and the names are variables of the collection 'frozen': no params, so that nothing
perturbs or decays them, and no part of a TrainState, so that no step copies them. Other names in
their place make the same context a classifier of other classes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_jax.errors import UserError
from sam_jax.models import clip, layers


class Prompts(layers.Network, kw_only=True):
    """CLIP with a learned context.

    Attributes:
      size: of CLIP.
      patch: side of a patch in pixels.
      context: number of learned vectors.
      words: what the context says at the start, as many tokens; '' for random vectors.
      exact_gelu: of CLIP.
    """

    size: clip.Size
    patch: int
    context: int = 16
    words: str = ''
    exact_gelu: bool = False

    frozen = True

    def __post_init__(self):
        if self.patch < 1:
            raise UserError(f'A CLIP with patches of {self.patch} does not exist: at least 1.')
        if not 1 <= self.context <= self.size.length - 3:
            raise UserError(
                f'model.context is {self.context}; it must be at least 1 and at most '
                f'{self.size.length - 3}, so that a name has a place in a text of '
                f'{self.size.length} tokens.'
            )
        super().__post_init__()

    @property
    def clip(self) -> clip.CLIP:
        """The towers, whose params are variables here."""
        names = 'size', 'patch', 'exact_gelu', 'remat', 'dtype', 'param_dtype'
        return clip.CLIP(**{name: getattr(self, name) for name in names}, parent=None)

    def _random_towers(self, images):
        ids = jnp.zeros((1, 1), jnp.int32)
        return self.clip.init(self.make_rng('params'), images[:1], ids)['params']

    def _nameless(self):
        """Names of no letters: start, context, end."""
        last = self.size.vocabulary - 1
        ids = jnp.array([last - 1, *[0] * self.context, last], jnp.int32)
        return jnp.tile(ids, (self.num_classes, 1))

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        del train  # nothing is dropped
        towers = self.variable('frozen', 'clip', self._random_towers, images).value
        names = self.variable('frozen', 'names', self._nameless).value
        context: Any = layers.Learned(
            leaf='vectors',
            shape=(self.context, self.size.text.width),
            initializer=nn.initializers.normal(0.02),
            param_dtype=self.param_dtype,
            name='context',
        )()

        def of_clip(method, *args) -> Any:
            return self.clip.apply({'params': towers}, *args, method=method)

        texts = prompted(of_clip('embed', names), context)
        texts = of_clip('encode_texts', texts, jnp.argmax(names, axis=-1))
        return of_clip('similarities', of_clip('encode_images', images), texts)


def prompted(embedded: jax.Array, context: jax.Array) -> jax.Array:
    """Returns embedded texts (N, T, width) with the context (n, width) behind the first token."""
    n = len(context)
    learned = jnp.broadcast_to(context.astype(embedded.dtype), (len(embedded), *context.shape))
    return jnp.concatenate([embedded[:, :1], learned, embedded[:, 1 + n :]], axis=1)
