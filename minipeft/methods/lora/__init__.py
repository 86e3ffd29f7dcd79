"""LoRA, its variants and its ways to start."""
