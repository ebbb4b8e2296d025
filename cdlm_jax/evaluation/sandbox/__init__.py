"""The inside of the code sandbox: run by path in a bare interpreter, never imported by the rest of the package."""
