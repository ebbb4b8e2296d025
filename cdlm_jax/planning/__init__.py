"""Whether a run fits a machine that is not there, and what bounds it: the real programs, compiled ahead of time."""
