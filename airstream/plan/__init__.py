"""This folder decides what stays in memory, what is streamed, and what the peak will be, by arithmetic alone.

It knows sizes, budgets and rates. It refuses to know modules, files and devices: it allocates and reads nothing. Read
`facts` and `request` (what goes in), `plan` (what comes out), `step` (what a pass gives), then `policy` (the numbers
that somebody chose) and `planner`, with `groups` and `spread`; `predict` and `traffic` say how long a pass takes,
`refusal`, `text` and `whatif` what is said of a plan.
"""
