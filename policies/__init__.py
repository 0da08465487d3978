"""Where workloads should run: pure functions from a cluster's state to moves. Nothing is here yet."""
