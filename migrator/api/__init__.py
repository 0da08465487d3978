"""The one way in: what the command line, the agent and a fleet controller call.

    migration   migrate, check            between two hosts
    image       checkpoint, restart, wait to and from a file, a pipe or a socket, on one host
    containers  run, wait, stop, thaw, list, watch
    recovery    settle, decide            what a program that died has left
    local       checkpoint, restart       as those of `image`, blocking

All of it is re-exported by `migrator`. Nothing here writes to a terminal or handles signals.
"""
