"""Functions that count their calls."""

from collections import Counter
from collections.abc import Callable


def counted(counts: Counter, name: str, function: Callable) -> Callable:
    """The function, each call of which adds one to `counts[name]`."""

    def call(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return call
