"""This folder brings layer batches through a ring of memory, in the order in which they are needed.

It knows batches and bytes. It refuses to know modules, and decides nothing: sizes and depth are in the plan. Read
`fill` (what has to come for a batch), `region` (a place in the ring), `lease` (who uses it), `room` (who waits for it)
and `order` (which batch is next), then `streamer`, which composes them, and `store`, which keeps what stays when the
plan changes.
"""
