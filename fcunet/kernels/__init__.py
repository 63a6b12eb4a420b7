"""Arithmetic on one batch of patterns or peaks: plain arrays and tensors in, the same out.

Nothing here knows of xarray, Dask, Zarr, files or environment variables.
"""
