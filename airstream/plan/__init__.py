"""Planning: what stays in memory, what is streamed, and what the peak will be, by arithmetic alone."""
