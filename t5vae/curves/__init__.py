"""Runs seen from outside: what `t5vae runs` and `t5vae plot` tell from metrics.jsonl alone.

They work on a copy of that file, on a machine that could not train: no torch, no configuration.
"""
