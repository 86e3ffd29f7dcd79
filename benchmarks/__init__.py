"""Time and memory of minipeft and peft, side by side: `python -m benchmarks`."""
