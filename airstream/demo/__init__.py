"""A small real model to try airstream on: where it comes from, and how it is unpacked."""
