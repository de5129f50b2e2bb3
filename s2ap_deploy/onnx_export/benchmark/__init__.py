"""What a file costs on this machine: time and memory."""
