"""bigseg: train a U-Net on a few annotated crops, segment OME-Zarr volumes of any size."""

__version__ = "0.1.0"
