"""Steps and whole runs of mask search and fine-tuning, and the data pipeline."""
