"""What all tests share: the garbage collector leaves alone what lives as long as the run."""

import gc


def pytest_collection_finish():
    """Tens of thousands of collected tests and the libraries' modules: each full collection would visit all of it.

    What tests leave behind in cycles waits a little longer than by default: looking for it took a quarter of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
