"""The project's WideResNet and its SAM step in PyTorch, from the same weights; for benchmarks."""

import time

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional


def to_torch(x: np.ndarray) -> np.ndarray:
    """A kernel, matrix or vector of ours in PyTorch's order of dimensions."""
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[x.ndim]
    return np.ascontiguousarray(np.transpose(np.asarray(x), order))


def _buffer(name):
    """How PyTorch names the statistic."""
    return name.replace('/', '_')


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
        for name, x in named.items():
            if name.startswith('batch_stats/'):
                self.register_buffer(_buffer(name), x)

    def _weight(self, name):
        return self.weights[self.names.index(f'params/{name}')]

    def _statistic(self, name):
        return self.get_buffer(_buffer(f'batch_stats/{name}'))

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
                self._statistic(f'{name}/mean'),
                self._statistic(f'{name}/var'),
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

    In bfloat16 (`config.model.dtype`) by autocast, in float32 with TF32 where the device has it.
    What goes over all weights does so in as few calls as PyTorch has for it, and nothing waits for
    the device.

    Args:
      model, variables: as of `WideResNet`.
      images, labels: NumPy, (N, H, W, C) float32 and (N,).
      config: the run's config.
      form: of FORMS: how images lie in memory, and whether the network is compiled by
        torch.compile. It changes PyTorch's speed, and numbers by rounding at most.
      device: 'cpu' or 'cuda'.
    """

    FORMS = ('default', 'channels_last', 'compiled')

    def __init__(self, model, variables, images, labels, config, form, device):
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.benchmark = True
        layout = torch.contiguous_format if form == 'default' else torch.channels_last
        self.net = WideResNet(model, variables, train=True).to(device, memory_format=layout)
        self._call = torch.compile(self.net) if form == 'compiled' else self.net
        images = torch.tensor(images.transpose(0, 3, 1, 2))
        self._images = images.to(device).contiguous(memory_format=layout)
        self._labels = torch.tensor(labels.astype(np.int64)).to(device)
        self._config, self._device = config, device
        self._optimizer = torch.optim.SGD(
            self.net.parameters(),
            config.optimizer.learning_rate,
            config.optimizer.momentum,
            nesterov=config.optimizer.nesterov,
        )

    def _backward(self):
        """Leaves the gradients in the weights, and returns them."""
        self._optimizer.zero_grad()
        half = self._config.model.dtype == 'bfloat16'
        with torch.autocast(self._device, torch.bfloat16, enabled=half):
            logits = self._call(self._images)
        loss = functional.cross_entropy(
            logits.float(), self._labels, label_smoothing=self._config.label_smoothing
        )
        loss.backward()
        weights = list(self.net.parameters())
        grads = [w.grad for w in weights]
        with torch.no_grad():
            torch._foreach_add_(grads, weights, alpha=self._config.optimizer.weight_decay)
        return grads

    def step(self) -> None:
        """Starts one SAM step; `time` waits for it."""
        weights = list(self.net.parameters())
        grads = self._backward()
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            before = [w.clone() for w in weights]
            torch._foreach_add_(weights, torch._foreach_mul(grads, self._config.sam.rho / norm))
        self._backward()
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        nn.utils.clip_grad_norm_(weights, self._config.optimizer.clip_norm)
        self._optimizer.step()

    def time(self, steps: int) -> float:
        """Seconds a step, over a few."""
        then = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self._device == 'cuda':
            torch.cuda.synchronize()
        return (time.perf_counter() - then) / steps

    def params(self) -> dict[str, np.ndarray]:
        """{our name: the parameter in our order of dimensions}."""
        back = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
        return {
            name.removeprefix('params/'): np.transpose(w.detach().cpu().numpy(), back[w.ndim])
            for name, w in zip(self.net.names, self.net.weights)
        }
