"""Sets of moments, as sorted lists of `(start, end)` that do not overlap."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Intervals = list[tuple[float, float]]


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The moments that are in any of `intervals`, which may overlap and come in any order."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            last_start, last_end = merged[-1]
            merged[-1] = last_start, max(end, last_end)
        elif end > start:
            merged.append((start, end))
    return merged


def subtract(whole: Intervals, other: Intervals) -> Intervals:
    """The moments of `whole` that are not in `other`."""
    rest: Intervals = []
    index = 0
    for begin, end in whole:
        start = begin
        while index < len(other) and other[index][1] <= start:
            index += 1
        # `other[index - 1]` may go on into the next interval of `whole`, so `index` stays.
        position = index
        while position < len(other) and other[position][0] < end:
            if other[position][0] > start:
                rest.append((start, other[position][0]))
            start = max(start, other[position][1])
            position += 1
        if end > start:
            rest.append((start, end))
    return rest


def intersect(first: Intervals, second: Intervals) -> Intervals:
    """The moments that are in both."""
    return subtract(first, subtract(first, second))


def length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


def contains(intervals: Intervals, moment: float) -> bool:
    index = bisect_right(intervals, moment, key=lambda interval: interval[0]) - 1
    return index >= 0 and moment < intervals[index][1]
