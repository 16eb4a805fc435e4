"""Ways to damage what the pack opens: each takes a `random.Random` and an undamaged file's bytes, and
gives damaged bytes and words that say what was done."""
