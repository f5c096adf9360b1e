"""This folder reads checkpoints that `torch.save` wrote, without executing anything in them.

It knows pickles and zip archives. It refuses to call what a file names. Read `archive` (where records lie), `described`
and `unpickle` (what the pickle says), `tensors` (which tensor lies where), then `gather` (what has to be copied
together).
"""
