"""Training a guest: on copies of its weights, by steps that are finite and whole."""
