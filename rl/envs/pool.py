"""A pool of threads that step blocks of envs without a lock in the way.

Handing a task to a Python thread costs 30-100 microseconds, as long as stepping 4,096 CartPoles takes. So each thread stays
inside one compiled, GIL-free loop and watches a counter in memory; the step's caller publishes the action's address, raises
the counter, does its own block and waits for the others. A thread that saw no work for a while goes back to Python and sleeps
on an event, so that an idle pool burns no core.
"""

import threading

import numpy as np

from rl.envs.drivers import UNFINISHED, Buffers, CpuDrivers
from rl.kernels.jit import driver, load_acquire

_SPINS = 100_000  # looks at the counter before a thread goes to sleep: about 0.1 ms
_WORDS = 8  # int64 per thread: one cache line, so that threads do not write into each other's


@driver
def _collect(controls, threads, ticket, spins):
    """How many threads have finished `ticket` in a row from the first, looking at most `spins` times."""
    k = 0
    while k < threads and spins > 0:
        if load_acquire(controls + k * 64 + 16) == ticket:
            k += 1
        else:
            spins -= 1
    return k


class ThreadPool:
    """`threads - 1` helpers beside the calling thread, each with its own range of envs."""

    def __init__(self, drivers: CpuDrivers, table: int, num_envs: int, threads: int, arrays: Buffers):
        self._drivers = drivers
        self._table = table
        self._clock, self._terminated, self._truncated = arrays.clock, arrays.terminated, arrays.truncated
        edges = np.linspace(0, num_envs, threads + 1).astype(np.int64)
        self._own = (int(edges[0]), int(edges[1]))
        self._helpers = threads - 1
        raw = np.zeros(_WORDS * (self._helpers + 1), np.int64)
        skip = (-raw.ctypes.data // 8) % _WORDS  # start on a cache line
        self._control = raw[skip : skip + _WORDS * self._helpers].reshape(self._helpers, _WORDS)
        self._address = self._control.ctypes.data
        self._ticket = 0
        self._wake = [threading.Event() for _ in range(self._helpers)]
        self._asleep = [True] * self._helpers
        self._closed = False
        self._failure: BaseException | None = None
        drivers.pooled.prepare()
        drivers.serve.prepare()  # here and not in the helpers, who would compile it side by side
        self._threads = [
            threading.Thread(target=self._serve, args=(k, int(edges[k + 1]), int(edges[k + 2])), daemon=True, name=f"rl-env-{k}")
            for k in range(self._helpers)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, k: int, lo: int, hi: int) -> None:
        control = self._address + k * 8 * _WORDS
        while not self._closed:
            self._wake[k].wait()
            self._wake[k].clear()
            self._asleep[k] = False
            # A ticket raised between the last look and this line is seen at the next: the counter keeps it.
            try:
                self._drivers.serve(self._table, control, lo, hi, _SPINS)
            except BaseException as error:  # the caller waits for this thread: tell it
                self._failure = error
                return
            self._asleep[k] = True
            if self._control[k, 0] != self._control[k, 2]:
                self._wake[k].set()

    def step(self, action: np.ndarray) -> int:
        """Step all envs; the number of episodes ended, or -1 - i for an impossible action i, in which case none has moved."""
        for k in range(self._helpers):
            if self._asleep[k]:
                self._wake[k].set()
        ticket = self._ticket + 1
        ended = self._drivers.pooled(self._table, action, self._address, self._helpers, ticket, *self._own, _SPINS)
        if ended < 0 and ended != UNFINISHED:
            return ended
        self._ticket = ticket
        if ended == UNFINISHED:
            ended = self._wait()
        return ended

    def _wait(self) -> int:
        """The slow end of a step: some helper had gone to sleep, or its core was taken away."""
        interrupted: BaseException | None = None
        while True:
            try:
                while _collect(self._address, self._helpers, self._ticket, _SPINS) < self._helpers:
                    if self._failure is not None:
                        raise RuntimeError("a thread that steps envs has failed") from self._failure
                    for k in range(self._helpers):
                        if self._asleep[k]:
                            self._wake[k].set()
                break
            except KeyboardInterrupt as error:  # nobody may still be reading `action` when this returns
                interrupted = error
        self._clock[0] += 1
        if interrupted is not None:
            raise interrupted
        return int(self._control[:, 3].sum()) + self._own_ended()

    def _own_ended(self) -> int:
        """Episodes that ended in the calling thread's own block."""
        lo, hi = self._own
        return int((self._terminated[lo:hi] | self._truncated[lo:hi]).sum())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._control[:, 0] = -1
        for event in self._wake:
            event.set()
        for thread in self._threads:
            thread.join(timeout=5)
