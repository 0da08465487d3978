"""The user engine: checkpoint and restart by ptrace(2) and /proc, on a stock kernel."""
