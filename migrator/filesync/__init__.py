"""Files and trees that are carried along with a workload."""
