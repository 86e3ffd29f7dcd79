"""Formulas that several methods share: rotations, random draws, wavelets, sparse matrices, decompositions."""
