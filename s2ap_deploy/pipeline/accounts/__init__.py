"""What a finished run has to tell: facts for reports and comparisons."""
