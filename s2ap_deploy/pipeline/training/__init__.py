"""The networks of a run: dense, and pruned by search and fine-tuning."""
