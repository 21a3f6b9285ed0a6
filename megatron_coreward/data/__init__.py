"""Questions in: parquet files to tokenised Problems, and the order in which a run meets them."""
