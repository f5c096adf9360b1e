"""Where the time of a running model goes: what is recorded, what is made of it, and how it is shown."""
