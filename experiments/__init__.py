"""Studies of the papers that stand outside the package; each runs with one command."""
