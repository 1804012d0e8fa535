"""Work on one partition, in memory: no Dask and no files."""
