"""What migrator does, for programs: the command line, the agent and a fleet controller call the same functions."""
