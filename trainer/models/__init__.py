"""The frozen base model, and what is read from any model: heads, losses, precision."""
