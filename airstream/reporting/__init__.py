"""This folder has what a user sees while work goes on and after it: sizes in words, counts, a status line, figures.

It knows terminals and notebooks. It refuses to know models, devices and plans. Read `units`, `probe` and `stats` first,
then `status` and `notebook`, then `figure`.
"""
