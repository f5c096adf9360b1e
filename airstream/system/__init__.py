"""This process and the machine below it: memory, files of others, the cache folder, forks."""
