"""A folder as the Hugging Face Hub has it: weights, config.json, and a model card."""

import os

from sam_jax import tables
from sam_jax.trained import folders
from sam_jax.trained.model import Trained


def write(model: Trained, folder: str, dtype: str = '', license: str = '') -> str:
    """Writes the folder of a published network with the names of the Hub, and README.md.

    Args:
      model: what `load` returns.
      folder: as of `folders.write`; its last part is the name of the model.
      dtype: as of `folders.write`.
      license: of the weights, by its name on the Hub (apache-2.0, cc-by-4.0, ...); '' says nothing.

    Returns:
      The path of the file of weights.
    """
    path = folders.write(model, folder, folders.HUGGING_FACE, dtype)
    name = os.path.basename(os.path.abspath(folder))
    with open(os.path.join(folder, 'README.md'), 'w') as file:
        file.write(card(model, name, license))
    return path


def card(model: Trained, name: str, license: str = '') -> str:
    """Returns the model card, Markdown with YAML in front: settings, result, and how to use it."""
    import yaml

    config, error = model.config, model.test_error
    shape = ', '.join(map(str, ('N', *model.preprocessing.shape)))
    front = {
        'library_name': 'sam_jax',
        **({'license': license} if license else {}),
        'pipeline_tag': 'image-classification',
        'tags': ['image-classification', 'sharpness-aware-minimization', 'jax', 'flax'],
        'metrics': ['accuracy'],
    }
    if error is not None:
        measured = {
            'task': {'type': 'image-classification'},
            'dataset': {'name': config.data.name, 'type': config.data.name, 'split': 'test'},
            'metrics': [{'type': 'accuracy', 'value': round(1 - error, 6)}],
        }
        front['model-index'] = [{'name': name, 'results': [measured]}]
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {name}

Trained by `sam_jax`, [Sharpness-Aware Minimization](https://arxiv.org/abs/2010.01412) and its
relatives in JAX. `config.json` has all settings, `result.json` what was measured at the end.

{tables.markdown(('', ''), model.facts.items())}

## Use

```python
import sam_jax

model = sam_jax.load('{name}')
probabilities = model.predict(images)
```

`images` are uint8, ({shape}), values from 0 to 255. The preprocessing of the training is
part of the model. Classes, in the order of the probabilities:
{', '.join(model.classes)}.
"""
