"""Proving a checkpoint complete and uncorrupted: what is looked at, and the report of it."""
