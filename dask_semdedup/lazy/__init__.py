"""All that knows Dask: expressions, alignment, planning, and a module for each lazy operation."""
