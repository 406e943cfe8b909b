"""The torch backend: every operation on any device, block by block, in plain torch."""
