"""Collection of curvature factors."""
