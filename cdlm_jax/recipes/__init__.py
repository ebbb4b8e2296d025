"""Whole runs: the stages, the quickstart, the benchmark."""
