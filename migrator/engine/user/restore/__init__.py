"""The destination side: records become a process tree."""
