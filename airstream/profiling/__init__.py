"""Where the time of a running model goes: what is recorded, what is made of it, and how it is shown."""

from airstream.profiling.costs import Costs, LinkUse
from airstream.profiling.profile import LayerProfile, MemoryUse, PassProfile, Profile
from airstream.profiling.recorder import Recorder

__all__ = ["Costs", "LayerProfile", "LinkUse", "MemoryUse", "PassProfile", "Profile", "Recorder"]
