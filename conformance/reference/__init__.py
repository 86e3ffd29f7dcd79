"""What is right: the methods' formulas and laws in NumPy, base models as data, and the recorded cases."""
