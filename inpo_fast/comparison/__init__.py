"""Pictures by several models from the same noise, judged: win-rates, prompts, votes."""
