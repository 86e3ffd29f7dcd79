"""AdaLoRA, and how it spends its budget of ranks."""
