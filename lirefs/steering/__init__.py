"""Steering at inference: operators, strengths, scopes and gates."""
