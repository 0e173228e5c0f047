"""CUDA graphs: work recorded once and replayed without Python, for `compile=true` on a GPU.

A graph reads and writes the memory it was recorded with, so what goes in is copied to fixed places first. Everything here
needs a CUDA device; the tests are marked `gpu`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class GraphedUpdate:
    """`function(part) -> tensors` as one graph per shape of `part`, a dict of tensors.

    Args:
        function: must not wait for the device and must keep its parameters and optimiser state in place.
        state: every tensor that `function` changes; put back after the warm-up runs which a recording needs.
    """

    def __init__(self, function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], state: Iterable[Tensor]):
        self._function, self._state = function, list(state)
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], tuple[Tensor, ...]]] = {}

    def __call__(self, part: dict[str, Tensor]) -> tuple[Tensor, ...]:
        key = tuple((name, x.shape, x.dtype) for name, x in part.items())
        if key not in self._recorded:
            self._recorded[key] = self._record(part)
        graph, inputs, outputs = self._recorded[key]
        for name, x in part.items():
            inputs[name].copy_(x)
        graph.replay()
        return tuple(x.clone() for x in outputs)

    def _record(self, part: dict[str, Tensor]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], tuple[Tensor, ...]]:
        inputs = {name: x.clone() for name, x in part.items()}
        saved = [x.detach().clone() for x in self._state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces in the first runs, which a recording must not see
            for _ in range(3):
                self._function(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(inputs)
        with torch.no_grad():
            for x, before in zip(self._state, saved, strict=True):
                x.copy_(before)
        return graph, inputs, outputs


class GraphedCollect:
    """`collect(recurrent) -> recurrent`, a whole rollout of an env on the GPU, as one graph.

    The first call runs as it is: storage is allocated and kernels are compiled. The second is recorded.

    Args:
        collect: steps the env and fills the storage; reads observations from the env's own buffer.
        generators: the random generators it draws from.
    """

    def __init__(self, collect: Callable[[Any], Any], generators: Iterable[torch.Generator]):
        self._collect, self._generators = collect, list(generators)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._first: Tensor | None = None
        self._last: Tensor | None = None

    def __call__(self, recurrent: Any) -> Any:
        if not self._warm:
            self._warm = True
            return self._collect(recurrent)
        if self._graph is None:
            self._first = None if recurrent is None else recurrent.clone()
            graph = torch.cuda.CUDAGraph()
            for generator in self._generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                self._last = self._collect(self._first)
            self._graph = graph
        if self._first is not None:
            assert recurrent is not None
            self._first.copy_(recurrent)
        self._graph.replay()
        return None if self._last is None else self._last.clone()
