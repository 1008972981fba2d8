"""The steps of a run, and their micro-batches made ahead in a thread."""

import time
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, runtime_checkable

HAND_OVER_S = 0.001
"""Making a step's micro-batches in a thread pays when it takes longer than this."""


@runtime_checkable
class Batches(Protocol):
    """The data of a run, cut into optimizer steps; every step can be asked for at any time."""

    def __len__(self) -> int:
        """Count the optimizer steps of the run."""
        ...

    def __getitem__(self, step: int, /) -> Sequence[Any]:
        """Make this rank's micro-batches of a step, from 0; there may be none."""
        ...


class Ahead:
    """Makes the next step's micro-batches in a thread while this one's are computed on.

    It begins once two steps running took longer to make than to hand over: one may have waited for the processor.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._num_slow = 0
        self._wanted: SimpleQueue[int | None] = SimpleQueue()
        self._made: SimpleQueue[Sequence[Any] | BaseException] = SimpleQueue()
        self._thread = Thread(target=self._work, name="batches", daemon=True)

    def __enter__(self) -> "Ahead":
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the thread."""
        self._wanted.put(None)
        self._thread.join()

    def take(self, step: int) -> Sequence[Any]:
        """Return a step's micro-batches and begin with the next one's; what went wrong there is raised here."""
        if self._num_slow < 2:
            began = time.perf_counter()
            now = self._batches[step]
            self._num_slow = self._num_slow + 1 if time.perf_counter() - began > HAND_OVER_S else 0
            if self._num_slow == 2:
                self._want(step + 1)
            return now
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        self._want(step + 1)
        return made

    def _want(self, step: int) -> None:
        if step < len(self._batches):
            self._wanted.put(step)

    def _work(self) -> None:
        while (step := self._wanted.get()) is not None:
            try:
                self._made.put(self._batches[step])
            except BaseException as error:
                self._made.put(error)
