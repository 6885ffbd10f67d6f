"""The ways to compute tree attention: a file each, and a line in `registry`."""
