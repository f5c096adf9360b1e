"""How bytes move: files, reader threads, and the memory of one device."""
