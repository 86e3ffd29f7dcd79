"""Recording golden data from a reference implementation, and what is promised of it."""
