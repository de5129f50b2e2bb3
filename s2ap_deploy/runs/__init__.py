"""The run folder: finished stages, their inputs and outputs, and snapshots to resume from."""
