"""A pool of threads that step blocks of envs without a lock in the way.

Handing a task to a Python thread costs 30-100 microseconds, as long as stepping 4,096 CartPoles takes. So each thread stays
inside one compiled, GIL-free loop and watches a counter in memory; the step's caller publishes the action's address, raises
the counter, does its own block and waits for the others. A thread that saw no work for a while goes back to Python and sleeps
on an event, so that an idle pool burns no core.
"""

import threading
from functools import cache
from typing import Any

import numpy as np
from numba import types

from rl.envs.drivers import WRONG_SHAPE, CpuDrivers, fix
from rl.kernels.jit import address_of, driver, load_acquire, store_release

_SPINS = 100_000  # looks at the counter before a thread goes to sleep: about 0.1 ms
_WORDS = 8  # int64 per thread: one cache line, so that threads do not write into each other's


@cache
def publisher(action_type: Any) -> Any:
    """A compiled `publish(controls, threads, ticket, action)` that takes action arrays of just this Numba type."""

    @driver
    def publish(controls, threads, ticket, action):
        for k in range(threads):
            store_release(controls + k * 64 + 8, address_of(action))
            store_release(controls + k * 64, ticket)

    return fix(publish, (types.int64, types.int64, types.int64, action_type))


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

    def __init__(self, drivers: CpuDrivers, table: int, num_envs: int, size: int, threads: int, clock: np.ndarray):
        self._drivers = drivers
        self._table = table
        self._size = size  # numbers in an action array
        self._clock = clock
        self._publish = publisher(drivers.action_type)
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
            self._drivers.serve(self._table, control, lo, hi, _SPINS)
            self._asleep[k] = True
            if self._control[k, 0] != self._control[k, 2]:
                self._wake[k].set()

    def step(self, action: np.ndarray) -> int:
        """Step all envs; the number of episodes ended, or -1 - i for an impossible action i, in which case none has moved."""
        if action.size != self._size:
            return WRONG_SHAPE
        # Looked through here and not by each thread in its block: one must not move while another finds something wrong.
        refused = self._drivers.scan(self._table, action)  # TypeError for an array of another type
        if refused < 0:
            return refused
        self._publish(self._address, self._helpers, self._ticket + 1, action)
        self._ticket += 1
        for k in range(self._helpers):
            if self._asleep[k]:
                self._wake[k].set()
        ended = self._drivers.step(self._table, action, *self._own)
        while _collect(self._address, self._helpers, self._ticket, _SPINS) < self._helpers:
            for k in range(self._helpers):  # one went to sleep as the ticket was raised
                if self._asleep[k]:
                    self._wake[k].set()
        for k in range(self._helpers):
            result = int(self._control[k, 3])
            ended = ended + result if ended >= 0 and result >= 0 else (ended if ended < 0 else result)
        if ended >= 0:
            self._clock[0] += 1
        return ended

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._control[:, 0] = -1
        for event in self._wake:
            event.set()
        for thread in self._threads:
            thread.join(timeout=5)
