"""Shadow."""
