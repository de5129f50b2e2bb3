"""What every stage starts from: what was asked, the machine that does it, the run folder it works in."""
