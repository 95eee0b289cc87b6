"""The harness: tasks, comparison and report."""
