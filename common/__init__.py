"""Plumbing of the course: what no paper explains. Imports no project."""
