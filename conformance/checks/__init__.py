"""Everything that is checked. A check is a function that raises `Failure`; how the outcome is told is the runner's."""

from __future__ import annotations


class Failure(Exception):
    """The implementation answered, and the answer is wrong."""

    def __init__(self, message: str, expected: str = "", got: str = "", by: float | None = None):
        super().__init__(message)
        self.message, self.expected, self.got, self.by = message, expected, got, by
