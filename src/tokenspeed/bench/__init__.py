"""Benchmarks: commands that print a table and JSON. Rule: both sides run in one process, in turn."""
