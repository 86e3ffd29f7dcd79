"""Running the checks against a driver, and telling how each ended."""
