"""A vision transformer on partly wrong labels, and what an edit of its flat curvature gives back.

Second half of Merullo et al. 2025 (arXiv 2510.24256), at the size of two processor cores.
"""
