"""This writes a profile as a table of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from airstream.profiling.costs import Costs
from airstream.profiling.profile_data import LayerProfile, ProfileData
from airstream.reporting.probe import DISK, LINKS
from airstream.reporting.units import counted, format_bytes, format_seconds

WIDTH = 80
MAX_LATE_LAYERS = 3

CACHED_DISK = "disk/page cache"

PAGE_CACHE = "through page cache"
"""Why there is no saying how fast the disk is: what is read may be in memory already."""


def describe(profile: ProfileData) -> str:
    """The table; it ends without a newline."""
    if not profile.first_pass:
        return f"{_title(profile)}\n  nothing has run yet"
    sections = (_times(profile), _links(profile), _memory(profile), _late(profile))
    return "\n".join([_title(profile), *(line for section in sections for line in section)])


def _title(profile: ProfileData) -> str:
    where = f" on {profile.device}, {profile.dtype}"
    room = WIDTH - len(where)
    name = profile.model if len(profile.model) <= room else f"...{profile.model[3 - room :]}"
    return f"{name}{where}"


def _times(profile: ProfileData) -> Iterator[str]:
    decode, prefill = profile.decode, profile.prefill
    tokens = [f"{counted(profile.new_tokens, 'new token')}"] if profile.new_tokens else []
    if profile.ttft_seconds:
        tokens.append(f"first after {format_seconds(profile.ttft_seconds[-1])}")
    if profile.seconds_per_token is not None:
        tokens.append(f"then {format_seconds(profile.seconds_per_token)} each")
        if profile.predicted_seconds_per_token is not None:
            guessed = " by assumed rates (airstream hardware measures them)" if profile.is_predicted_by_guess else ""
            tokens.append(f"predicted {format_seconds(profile.predicted_seconds_per_token)}{guessed}")
    yield from textwrap.wrap(", ".join(tokens), WIDTH, initial_indent="  ", subsequent_indent="  ")
    yield ""
    columns = [(name, costs) for name, costs in (("prefill", prefill), ("decode", decode)) if costs.passes]
    yield _row("seconds per pass", [f"{f'{costs.passes} {name}':>20}" for name, costs in columns])
    for label, name in (("wall", "wall_seconds"), ("compute", "compute_seconds"), ("stall", "stall_seconds")):
        yield _row(f"  {label}", [_share(getattr(costs, name), costs) for _, costs in columns])
    causes = sorted({cause for _, costs in columns for cause in costs.stalls})
    for cause in causes:
        yield _row(
            f"    for {_named(cause, profile)}", [_share(costs.stalls.get(cause, 0.0), costs) for _, costs in columns]
        )
    yield _row("  sampling and Python", [_share(costs.python_seconds, costs) for _, costs in columns])


def _named(cause: str, profile: ProfileData) -> str:
    """What computation waited for: what is read through the page cache may come from there, or from the disk."""
    return CACHED_DISK if cause == DISK and not profile.is_direct else cause


def _row(label: str, cells: list[str]) -> str:
    return f"{label:<26}{''.join(cells)}".rstrip()


def _share(seconds: float, costs: Costs) -> str:
    share = seconds / costs.wall_seconds if costs.wall_seconds else 0.0
    return f"{format_seconds(seconds / costs.passes):>13}{share:>6.0%} "


def _links(profile: ProfileData) -> Iterator[str]:
    phase, total = ("decode", profile.decode) if profile.decode.passes else ("prefill", profile.prefill)
    used = [(link, total.links[link]) for link in LINKS if total.links[link].nbytes]
    if not used:
        return
    yield ""
    yield f"{phase + ' link':<14}{'a pass':>12}{'busy':>8}{'GB/s':>8}{'can do':>9}{'used':>7}"
    for link, use in used:
        rate = profile.rates.get(link)
        figures = f"{format_bytes(use.nbytes / total.passes):>12}{use.seconds / total.wall_seconds:>8.0%}"
        speed, limit, source = use.bytes_per_second, f"{'':16}", "" if profile.is_direct or link != DISK else PAGE_CACHE
        if rate is not None:
            limit, source = f"{rate.per_second / 1e9:>9.2f}{speed / rate.per_second:>7.0%}", rate.source
        line = f"{link:<14}{figures}{speed / 1e9:>8.2f}{limit}  "
        if len(line) + len(source) > WIDTH:
            source = source.partition(":")[0]  # "assumed", and of what is told where there is room
        yield (line + source).rstrip()[:WIDTH]
    yield f"{total.hidden:.0%} of the transfers hidden behind computation; bottleneck: {profile.bottleneck}"


def _memory(profile: ProfileData) -> Iterator[str]:
    if profile.memory:
        yield ""
    for tier, use in profile.memory.items():
        yield (
            f"memory {tier}: peak {format_bytes(use.peak_bytes)}, planned {format_bytes(use.planned_bytes)}, "
            f"budget {format_bytes(use.budget_bytes)}"
        )


def _late(profile: ProfileData) -> Iterator[str]:
    late = sorted((layer for layer in profile.layers.values() if layer.late), key=lambda layer: -layer.stall_seconds)
    if not late:
        return
    yield ""
    verb = "was" if len(late) == 1 else "were"
    yield f"{len(late)} of {counted(len(profile.layers), 'layer')} {verb} late; most of all"
    yield from (_late_line(layer, profile) for layer in late[:MAX_LATE_LAYERS])


def _late_line(layer: LayerProfile, profile: ProfileData) -> str:
    cause = max(layer.stalls, key=layer.stalls.__getitem__)
    text = (
        f"{layer.late} of {counted(layer.passes, 'time')}, {format_seconds(layer.stall_seconds / layer.late)} each, "
        f"waiting for {_named(cause, profile)}"
    )
    return f"  {layer.name[-(WIDTH - len(text) - 4) :]}: {text}"
