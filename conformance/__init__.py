"""A standalone suite that checks any implementation of parameter-efficient fine-tuning: see README.md beside this."""
