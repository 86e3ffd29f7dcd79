"""FRoD."""
