"""The project's WideResNet and its SAM step in PyTorch, from the same weights; for benchmarks."""

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional


def to_torch(x: np.ndarray) -> np.ndarray:
    """A kernel, matrix or vector of ours in PyTorch's order of dimensions."""
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[x.ndim]
    return np.ascontiguousarray(np.transpose(np.asarray(x), order))


class WideResNet(nn.Module):
    """The network of `sam_jax.models.wide_resnet` (BatchNorm, no dropout, no further skips).

    Args:
      model: our flax module.
      variables: its {'params', 'batch_stats'}.
      train: whether BatchNorm normalises by the batch, and keeps running statistics.
    """

    def __init__(self, model, variables, train):
        super().__init__()
        self.model, self.train_mode = model, train
        named = {
            '/'.join(k.key for k in path): torch.tensor(to_torch(x))
            for path, x in jax.tree_util.tree_flatten_with_path(jax.device_get(variables))[0]
        }
        self.names = [name for name in named if name.startswith('params/')]
        self.weights = nn.ParameterList([nn.Parameter(named[name]) for name in self.names])
        self.stats = {name: x for name, x in named.items() if name.startswith('batch_stats/')}

    def _weight(self, name):
        return self.weights[self.names.index(f'params/{name}')]

    def _conv(self, x, name, stride):
        # As TensorFlow pads: what is odd comes last.
        padded, padding = (functional.pad(x, (0, 1, 0, 1)), 0) if stride == 2 else (x, 1)
        return functional.conv2d(
            padded, self._weight(f'{name}/kernel'), stride=stride, padding=padding
        )

    def _activate(self, x, name):
        return functional.relu(
            functional.batch_norm(
                x,
                self.stats[f'batch_stats/{name}/mean'],
                self.stats[f'batch_stats/{name}/var'],
                self._weight(f'{name}/scale'),
                self._weight(f'{name}/bias'),
                self.train_mode,
                1 - self.model.batch_norm_momentum,
                self.model.batch_norm_epsilon,
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._conv(x, 'conv_init', 1)
        for group, stride in enumerate((1, 2, 2)):
            for block in range((self.model.depth - 4) // 6):
                name, step = f'group{group}_block{block}', stride if block == 0 else 1
                active = self._activate(x, f'{name}_bn1')
                shortcut = active if group == block == 0 else x
                y = self._conv(active, f'{name}_conv1', step)
                y = self._conv(self._activate(y, f'{name}_bn2'), f'{name}_conv2', 1)
                if step == 2:
                    shortcut = functional.avg_pool2d(shortcut, 2)
                more = y.shape[1] - shortcut.shape[1]
                x = y + functional.pad(shortcut, (0, 0, 0, 0, 0, more))
        x = self._activate(x, 'bn_final').mean(dim=(2, 3))
        return functional.linear(x, self._weight('head/kernel'), self._weight('head/bias'))


class Stepper:
    """SAM steps on one batch: gradient of cross entropy and L2 penalty, ascent, gradient, descent.

    Args:
      model, variables: as of `WideResNet`.
      images, labels: NumPy, (N, H, W, C) float32 and (N,).
      config: the run's config.
      channels_last: how images lie in memory, which changes PyTorch's speed and no number.
    """

    def __init__(self, model, variables, images, labels, config, channels_last):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = WideResNet(model, variables, train=True).to(memory_format=layout)
        self._images = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)
        self._labels = torch.tensor(labels.astype(np.int64))
        self._config = config
        self._optimizer = torch.optim.SGD(
            self.net.parameters(),
            config.optimizer.learning_rate,
            config.optimizer.momentum,
            nesterov=config.optimizer.nesterov,
        )

    def _backward(self):
        self._optimizer.zero_grad()
        loss = functional.cross_entropy(
            self.net(self._images), self._labels, label_smoothing=self._config.label_smoothing
        )
        penalty = sum(w.square().sum() for w in self.net.parameters())
        (loss + 0.5 * self._config.optimizer.weight_decay * penalty).backward()

    def step(self) -> None:
        """Makes one SAM step, and returns once it is done."""
        weights = list(self.net.parameters())
        self._backward()
        with torch.no_grad():
            norm = torch.sqrt(sum(w.grad.square().sum() for w in weights))
            before = [w.clone() for w in weights]
            for w in weights:
                w.add_(w.grad, alpha=self._config.sam.rho / float(norm))
        self._backward()
        with torch.no_grad():
            for w, old in zip(weights, before):
                w.copy_(old)
        nn.utils.clip_grad_norm_(weights, self._config.optimizer.clip_norm)
        self._optimizer.step()

    def params(self) -> dict[str, np.ndarray]:
        """{our name: the parameter in our order of dimensions}."""
        back = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
        return {
            name.removeprefix('params/'): np.transpose(w.detach().numpy(), back[w.ndim])
            for name, w in zip(self.net.names, self.net.weights)
        }
