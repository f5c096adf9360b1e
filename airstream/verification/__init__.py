"""This folder proves that a checkpoint is complete and uncorrupted.

It knows headers, bytes and checksums. It refuses to mend anything. Read `report` (what can be found), `contents`,
`reading` and `checksums` (what is looked at), then `verify`, which composes them.
"""
