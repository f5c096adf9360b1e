"""This folder runs a model by a plan: it has the weights of a layer in place while the layer computes.

It knows modules, hooks and calls. It refuses to know how bytes move, and decides no plan. Read `streamed` (the class
that users have) and `engine` (what owns everything), then `executor`, `residency` and `binding`: the way of a layer.
Then `gate`, `turns` and `generations` (who may run now), `plans` (when the plan changes), `stored`, `absent` and
`weight` (what stands for a weight), and `adapters`.
"""
