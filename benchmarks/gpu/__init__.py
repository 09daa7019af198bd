"""The proof on a GPU, in pieces that can be asked for one by one: `python -m benchmarks.gpu`."""
