"""Data sources: files and hub ids to groups."""
