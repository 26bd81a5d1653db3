"""Adapters on a model: attached, switched, merged, and kept in files."""
