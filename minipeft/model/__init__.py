"""A model full of adapters: PeftModel and its relatives, prompts, saving to folders, cards."""
