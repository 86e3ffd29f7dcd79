"""An answer to each exercise. There are others."""
