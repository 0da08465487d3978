"""The source side: a running process tree becomes records."""
