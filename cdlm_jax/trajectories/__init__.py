"""Teacher trajectories: collecting them, storing them, rebuilding their states."""
