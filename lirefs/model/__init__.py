"""A language model as a guest: loaded, verified, identified, changed reversibly."""
