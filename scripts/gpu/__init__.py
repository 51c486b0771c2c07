"""One command for a machine with a GPU: tests, speed against HF + PEFT, and a profile."""
