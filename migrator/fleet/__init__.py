"""The fleet: its state, its signals, and the controller that gives the policies hands."""
