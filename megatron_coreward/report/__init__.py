"""Looking at runs after the fact: recomputed from what they left, drawn on a page. No engine, no network."""
