"""The frozen base model, and what is computed from any model: heads, losses, precision."""
