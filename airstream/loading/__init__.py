"""This folder goes from what the user asks for to everything that is known of a model before its first weight is read.

It knows options, machines and configs. It refuses to decide what stays in memory: that is planned. Read `options` and
`machine` first, then `prepare`, which calls `build` and `gather` in this order, and `prepared`: what comes of it.
"""
