"""This folder says where the time of a running model goes.

It knows passes, spans and bytes, as others report them. It refuses to change what it watches. Read `costs` and
`profile_data` (what is kept), `call` (which tokens count), `observer` and `recorder` (how it is recorded), then
`profile`, `text`, `plot` and `trace` (how it is shown).
"""
