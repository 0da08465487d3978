"""Guests for tests: QEMU machines that boot the patched kernel with this checkout in them.

A machine that dies, hangs or splats is another matter than a test that fails: `MachineLost` and
`KernelSplat` are errors, what a command in a healthy guest got wrong is an `AssertionError`.
"""
