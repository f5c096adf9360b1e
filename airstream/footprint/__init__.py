"""What a forward pass needs besides weights."""
