"""Checkpoints that `torch.save` wrote, read without executing anything in them."""
