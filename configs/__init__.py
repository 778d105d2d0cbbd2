"""Experiments: settings only."""
