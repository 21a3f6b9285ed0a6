"""A whole world in miniature that needs no download: a task with rephrasings, its tokenizer, and small models."""
