"""What curvature says about data."""
