"""The book: minipeft's methods read, run and seen. `python -m book` builds it; see README.md here."""
