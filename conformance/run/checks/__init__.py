"""Everything that is checked. A check is a function that raises `Failure`; how the outcome is told is the runner's."""
