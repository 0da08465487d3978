"""Where workloads should run: pure functions from a cluster's state and the time to moves.

Nothing here does I/O or knows the time: the caller passes a `model.Cluster` and gets back values (plans, actions,
records) that go to JSON by msgspec. `balance` evens out load, `drain` empties a host, `placement` finds places,
`simulate` replays days; `consistency` says what in a cluster's state cannot be believed.
"""
