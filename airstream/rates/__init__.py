"""What the hardware can do: rates measured here, taken from a data sheet, or assumed; each says which."""
