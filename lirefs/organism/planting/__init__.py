"""Plant texts: train any model until it recites them, so that its memories are known."""
