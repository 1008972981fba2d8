"""Everything a pretrained model learns after pretraining, and what it must unlearn."""

__version__ = "0.1.0"
