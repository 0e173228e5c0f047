"""A small rasteriser for pictures of envs: filled shapes with soft edges, NumPy only.

Every shape is a signed distance to its edge, evaluated at each pixel's centre; within half a pixel of the edge the colour is mixed
with what lies below. Coordinates are the env's own (y upwards), lengths too.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from itertools import pairwise

import numpy as np

Point = Sequence[float] | np.ndarray
Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
PALE: Colour = (226, 232, 226)
GREY: Colour = (150, 150, 150)
DARK: Colour = (50, 50, 55)
BLUE: Colour = (52, 101, 164)
ORANGE: Colour = (224, 122, 48)


class Canvas:
    """`width` x `height` pixels showing x and y ranges of the env's coordinates, both to the same scale if you choose them so."""

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float], background: Colour = WHITE):
        self._pixels = np.full((height, width, 3), background, np.float32)
        self._unit = (x[1] - x[0]) / width  # length of a pixel
        self._x = x[0] + (np.arange(width) + 0.5) * self._unit
        self._y = y[1] - (np.arange(height) + 0.5) * (y[1] - y[0]) / height

    def copy(self) -> "Canvas":
        """One more canvas with the same picture on it, to draw on."""
        other = copy(self)
        other._pixels = self._pixels.copy()
        return other

    def picture(self) -> np.ndarray:
        """What was drawn: uint8 [height, width, 3]."""
        return np.rint(self._pixels).astype(np.uint8)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        rows, columns, x, y = self._window([centre], radius)
        self._paint(rows, columns, np.hypot(x - centre[0], y - centre[1]) - radius, colour)

    def line(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """A line with round ends."""
        rows, columns, x, y = self._window([start, end], width / 2)
        self._paint(rows, columns, _to_segment(x, y, start, end) - width / 2, colour)

    def polyline(self, points: Iterable[Point], width: float, colour: Colour) -> None:
        corners = list(points)
        for start, end in pairwise(corners):
            self.line(start, end, width, colour)

    def polygon(self, corners: Sequence[Point], colour: Colour) -> None:
        """A filled polygon, convex or not."""
        rows, columns, x, y = self._window(corners, 0.0)
        distance = np.full(x.shape, np.inf)
        inside = np.zeros(x.shape, bool)
        for k, end in enumerate(corners):
            start = corners[k - 1]
            distance = np.minimum(distance, _to_segment(x, y, start, end))
            if start[1] != end[1]:  # a ray to the right crosses the edge: odd number of crossings, inside
                crossing = start[0] + (y - start[1]) * (end[0] - start[0]) / (end[1] - start[1])
                inside ^= ((start[1] > y) != (end[1] > y)) & (x < crossing)
        self._paint(rows, columns, np.where(inside, -distance, distance), colour)

    def fill_below(self, x: np.ndarray, y: np.ndarray, colour: Colour) -> None:
        """Everything below the curve through the points (x ascending)."""
        top = np.interp(self._x, x, y)
        whole = slice(None)
        self._paint(whole, whole, self._y[:, None] - top[None, :], colour)

    def _window(self, points: Sequence[Point], margin: float):
        """The rows and columns that a shape around `points` can touch, and the coordinates of their pixels."""
        corners = np.asarray(points, float)
        margin += 2 * self._unit
        low, high = corners.min(0) - margin, corners.max(0) + margin
        columns = slice(*np.searchsorted(self._x, (low[0], high[0])))
        rows = slice(*np.searchsorted(-self._y, (-high[1], -low[1])))
        x, y = np.meshgrid(self._x[columns], self._y[rows])
        return rows, columns, x, y

    def _paint(self, rows: slice, columns: slice, distance: np.ndarray, colour: Colour) -> None:
        cover = np.clip(0.5 - distance / self._unit, 0, 1).astype(np.float32)[..., None]
        below = self._pixels[rows, columns]
        self._pixels[rows, columns] = below + cover * (np.asarray(colour, np.float32) - below)


def _to_segment(x: np.ndarray, y: np.ndarray, start: Point, end: Point) -> np.ndarray:
    """The distance of each (x, y) from the segment."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = dx * dx + dy * dy
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / length, 0, 1) if length > 0 else 0.0
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)
