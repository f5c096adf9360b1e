"""One small runner for each system compared, each run by a Python that has that system installed.

A runner says how its system loads a checkpoint and generates greedily; `measure` does everything else, so that all of
them are measured by the same lines.
"""
