"""What to train. base.py holds every key; the other files state differences only."""
