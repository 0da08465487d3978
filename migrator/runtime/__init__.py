"""What a migration runs on: threads, latency, pipes, fault points."""
