"""Files: listing, footers, readers, layouts and writing. Nothing here knows Dask's collections."""
