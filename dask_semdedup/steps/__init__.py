"""What happens to one partition, in memory: no Dask and no files."""
