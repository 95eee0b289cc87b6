"""A vision transformer trained on partly wrong labels, and what a curvature edit recovers.

Second half of Merullo et al. 2025 (arXiv 2510.24256), scaled down to two processor cores.
"""
