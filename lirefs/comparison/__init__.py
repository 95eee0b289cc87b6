"""Comparisons of variants of one model on the same items, paired."""
