"""One file per method, found by itself: its cases, its formula, its shapes, its seeded faults."""
