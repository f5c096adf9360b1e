"""This has every number of a plan that somebody chose, with the reason for it.

It knows no model and no machine. What a disk, a kernel or an allocator demands stays with the mechanism that meets it.
Which embedding tables are large, and so parts of their own, is known before there is a plan: `layout/parts.py`.
"""

from __future__ import annotations

from airstream.reporting.units import GIB, MIB

# ----------------------------------------------------------------------------------- what a user who says nothing gets

AUTO_SHARE = 0.9
"""A budget that is not given takes this share of the free memory. The rest is head-room for everybody else."""

PAGE_CACHE_SHARE = 0.5
"""A checkpoint within this share of the memory left over is read through the page cache: it will stay there."""

CONTEXTS = (4096, 2048, 1024, 512, 256, 128)
"""These contexts are tried, in tokens, when `max_context` is not given: the longest that fits is planned for."""

PROMPT_TOKENS = 512
"""A prediction of the first token is for a prompt of so many tokens, if nothing else is said."""

AUTO_BATCH_BYTES = 32 * MIB
"""Layers smaller than this move several at a time: below it, the ends of reads cost more than they carry."""

# ------------------------------------------------------------------------------------------------ what stays in memory

MIN_SHARE = 1 / 16
"""A group makes up at least this share of its batch: norms and biases go along with their neighbours."""

TINY_SHARE = 1 / 16
"""A tensor smaller than this share of the smallest group never starts one."""

# -------------------------------------------------------------------------------------------------- what is read ahead

AHEAD_BYTES = 64 * MIB
"""At least so much is read ahead: twice what the reader has in flight, so that the disk never waits for room."""

MAX_AHEAD = 8
"""At most so many batches are read ahead: more of them make the ring larger, and the disk no busier."""

MIN_OVERLAPPED_CONTEXT = 512
"""Where a plan has room for no more tokens than this, it gives up reading ahead before it gives up context."""

WORTH_A_STEP = 1.25
"""Batches are made smaller, or fewer of them are read ahead, only if so many times less is streamed for it.

Chosen, not measured: it keeps plans from giving up room to read ahead for a small gain.
"""

# --------------------------------------------------------------------------------------- when another plan is followed

MIN_GAIN = 0.02
"""A change of plan is worth its while if this share of all weights becomes resident besides."""

GROWTH = 1.25
"""When a sequence outgrows its plan, the next one is made for so much more context, so that it lasts a while."""

GIVEN_BACK_BYTES = 8 * MIB
"""Memory is given back after a pass with so many bytes of activations. A few tokens have fewer of them."""

# --------------------------------------------------------------------------------------------------- what is suggested

MIN_CHUNK = 16
"""A prompt is never cut into pieces of fewer tokens: the passes over all layers would take too long."""

MORE_BYTES = 8 * GIB
"""A plan says how much faster it would be with so much more memory: the step in which memory is bought."""

WORTH_SAYING = 1.05
"""What would make a plan faster is said if it is at least so many times faster."""
