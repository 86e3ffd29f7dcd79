"""Prompt learning."""
