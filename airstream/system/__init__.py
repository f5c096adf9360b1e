"""This folder knows this process and the machine below it: memory, files of others, the cache folder, forks.

It refuses to know models and checkpoints. Its files stand beside each other and can be read in any order: `memory`,
`heap` and `kernels` are about memory, `foreign_files`, `foreign_json` and `impostors` about files that others wrote.
"""
