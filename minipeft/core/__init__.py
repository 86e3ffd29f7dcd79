"""The theory, and enough to use it alone: adapters, layers, merging, saving, loading. Imports none of the others."""
