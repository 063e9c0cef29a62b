"""Measurements: each program prints what it measured; `python dev.py bench` lists them."""
