"""This folder runs a model by a plan: it has the weights of a layer in place while the layer computes.

It knows modules, hooks and calls. It knows when another plan is needed. It refuses to know how bytes move, and how a
plan is made. Read `streamed` (the class that users have), `calls` (what a call asks for) and `engine` (what owns
everything). Then `executor`, `unit_hooks`, `residency`, `binding` and `conversion` are the way of a layer,
`residents` and `row_table` that of all else. Then `gate`, `turns` and `generations` say who may run now, `direct` lets
in calls of single layers, and `plans` says when the plan changes. `stored`, `absent` and `weight` are what stands for a
weight, and `asking` what it says of gradients. `adapters` has those of PEFT.
"""
