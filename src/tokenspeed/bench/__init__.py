"""Benchmarks: commands that print a table and JSON. Rule: both sides in one process, in turn."""
