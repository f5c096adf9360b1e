"""This folder makes many plans at once: which model fits which machine, and how fast it would be.

It knows plans and rates. It refuses to know weights and devices: a config is enough. Read `rows`, `plan_table` and
`table` for the table of cards, then `landscape`, `scales` and `map` for the picture.
"""
