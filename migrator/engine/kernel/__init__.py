"""The kernel engine: the system calls checkpoint() and restart() of a patched kernel do the work."""
