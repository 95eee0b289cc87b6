"""Experiments that stand above both packages: each may import `kfac`."""
