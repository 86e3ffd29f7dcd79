"""Exercises: a file for each to work in, its checks, and the answers beside. See the book's page of exercises."""
