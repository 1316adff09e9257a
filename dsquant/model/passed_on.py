"""Hidden states that stay in memory from a layer to the next, while a thread writes them into their file.

The next layer reads them as its inputs and gives their place, sample by sample, to what its MLPs read: so they need no
memory of their own.

Shape legend: N samples, T tokens of a sample, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition

import torch

from dsquant.model.activations import Activations


class PassedOn:
    """The outputs of a layer [N, T, H], as they are stored: in memory until their place is taken, then in a file."""

    def __init__(self, outputs: Activations, place: Activations) -> None:
        """Stores all samples of `outputs` in the place of others, which nobody reads any more."""
        self.values_NTH = place.stored(0, place.shape[0]).copy_(outputs.stored(0, outputs.shape[0]))
        self._ready = torch.cuda.Event() if self.values_NTH.is_cuda else None
        if self._ready is not None:
            self._ready.record()
        self._taken = self._saved = 0
        self._error: BaseException | None = None
        self._changed = Condition()

    def save(self, path: Path) -> None:
        """Writes everything into the file that `Activations.in_file` opens; for a thread of its own."""
        try:
            with self._beside_the_work():
                Activations(self.values_NTH).save(path, (0, len(self.values_NTH)), self._note_saved)
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Lets whoever waits for samples in the file know that they will not come."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def holds(self, start: int) -> bool:
        """Returns whether samples from number `start` on are still in memory."""
        return start >= self._taken

    def samples(self, start: int, stop: int) -> torch.Tensor | None:
        """Returns a copy of samples start..stop-1, float32; None where they are in the file alone."""
        if self.holds(start):
            return self.values_NTH[start:stop].to(torch.float32, copy=True)
        self._wait_for(stop)
        return None

    def take(self, stop: int) -> None:
        """Gives up the place of samples 0..stop-1, once the file has them.

        Raises the error that kept them from being written.
        """
        self._wait_for(stop)
        self._taken = max(self._taken, stop)

    def _wait_for(self, stop: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._saved >= stop or self._error is not None)
        if self._error is not None:
            raise self._error

    def _note_saved(self, stop: int) -> None:
        with self._changed:
            self._saved = stop
            self._changed.notify_all()

    @contextmanager
    def _beside_the_work(self) -> Iterator[None]:
        """Has a GPU copy on a stream of its own, behind what has made the values alone.

        PyTorch hands out its streams in turn, so graphs may be recorded on the same one: not while samples are saved.
        """
        if self._ready is None:
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream(self.values_NTH.device)):
            torch.cuda.current_stream().wait_event(self._ready)
            yield
