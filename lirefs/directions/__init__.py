"""Directions in the residual stream: captured, fitted, scored and saved."""
