"""Training configs: base.py defines every key; the other files only override some of them."""
