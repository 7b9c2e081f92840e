"""The harness that shows what each nearpeak kernel is worth: `nearpeak bench` and `pytest bench/`."""
