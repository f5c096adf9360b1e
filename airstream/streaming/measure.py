"""This measures how fast the layers come: a walk over all that is streamed, in which nothing computes.

It takes leases, as the hooks of a model do. It refuses to know how they are filled.
"""

from __future__ import annotations

from airstream.reporting.stats import LinkMeter, MeasuredLink
from airstream.streaming.streamer import Streamer


def measure_link(streamer: Streamer) -> MeasuredLink:
    """Stream every batch once without computing: from when nothing moves until nothing moves any more.

    What is loaded just once, and what has been read ahead, is out of the way first, so that it does not count; what
    is read ahead at the end does instead. Blocks for all of that, copies to the device included.
    """
    for batch, fill in enumerate(streamer.fills):
        if any(not once.loaded for once in fill.loaded_once):
            streamer.lease(batch).end()
    streamer.start()
    streamed = [batch for batch, fill in enumerate(streamer.fills) if fill.slab.nbytes]
    first = next((streamed.index(batch) for batch in streamer.upcoming() if batch in streamed), 0)
    streamer.wait_until_quiet()
    meter = LinkMeter(streamer.stats)
    for batch in (*streamed[first:], *streamed[:first]):
        streamer.lease(batch).end()
    streamer.wait_until_quiet()
    return meter.measured()
