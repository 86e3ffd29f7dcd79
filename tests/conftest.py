"""What all tests share: the garbage collector leaves alone what lives as long as the run."""

import gc


def pytest_collection_finish():
    """Tens of thousands of collected tests and the libraries' modules: each full collection would visit all of it."""
    gc.collect()
    gc.freeze()
