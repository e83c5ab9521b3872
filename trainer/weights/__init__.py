"""Weights in and out: files of other tools and of this one, and workdirs."""
