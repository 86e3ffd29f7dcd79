"""Methods that train virtual tokens."""
