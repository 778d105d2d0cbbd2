"""What a person sees of long work while it goes on: bars on a terminal, else lines."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

_log = logging.getLogger(__name__)


class Progress:
    """A bar on a terminal, plain log lines otherwise; on the main process only."""

    def __init__(self, first_step, total_steps, batch_size, active):
        self._total = total_steps
        self._batch_size = batch_size
        self._last = (first_step, None)
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        self._bar = None
        self._active = active
        if active and sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=total_steps, initial=first_step, unit='step')

    def start_clock(self, step: int) -> None:
        """From here on time counts as training: after compilation, after an evaluation."""
        self._last, self._waited = (step, time.perf_counter()), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the loop does only to get its next input."""
        then = time.perf_counter()
        yield
        self._waited += time.perf_counter() - then

    def input_wait(self) -> float:
        """Returns the fraction of the time since the clock was started that waited for input."""
        _, then = self._last
        return 0.0 if then is None else min(self._waited / (time.perf_counter() - then), 1.0)

    def images_per_second(self, step: int) -> float:
        """Returns the speed since the clock was started or this was called, and starts it anew."""
        before, then = self._last
        now = time.perf_counter()
        self._last, self._waited = (step, now), 0.0
        if then is None or step == before:
            return 0.0
        images = (step - before) * self._batch_size
        self._images += images
        self._seconds += now - then
        return images / (now - then)

    def overall_speed(self) -> float:
        """Returns images per second of training, compilation and evaluation left out."""
        return self._images / self._seconds if self._seconds else 0.0

    def line(self, step: int, loss: float, error_rate: float, images_per_second: float) -> None:
        if not self._active:
            return
        eta = (self._total - step) * self._batch_size / max(images_per_second, 1e-9)
        text = f'loss {loss:.4f}, error {100 * error_rate:.2f} %, {images_per_second:.0f} images/s'
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            self._bar.update(step - self._bar.n)
        else:
            eta = f'{eta:.0f} s' if images_per_second else 'unknown'
            _log.info('step %d/%d: %s, ETA %s', step, self._total, text, eta)

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            _log.info('%s', text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Bars:
    """How far a long work is: a bar for each part on a terminal, else a line every ten seconds."""

    def __init__(self):
        self._what, self._bar = None, None
        self._said_at = time.perf_counter()

    def __call__(self, what, done, total):
        if sys.stderr.isatty():
            self._draw(what, done, total)
        elif time.perf_counter() - self._said_at > 10:
            _log.info('%s: %d of %d', what, done, total)
            self._said_at = time.perf_counter()

    def _draw(self, what, done, total):
        import tqdm

        if what != self._what:
            self.close()
            self._what, self._bar = what, tqdm.tqdm(total=total, desc=what)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
